from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[CppExtension("sten_bitmask._C", ["bitmask.cpp"], extra_compile_args=["-O3", "-g0", "-fopenmp"])],
    cmdclass={"build_ext": BuildExtension},
)
