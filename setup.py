"""Builds the optional C++ extension `sten._C`; everything else about the package is in pyproject.toml.

Without a compiler, or when the build fails, the package installs without it and runs its reference kernels.
"""

import platform
import sys
from pathlib import Path

from setuptools import setup


def extension():
    """Return the extension and its build command, or nothing when torch cannot build one here."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"sten: building without the C++ kernels: {error}", file=sys.stderr)
        return [], {}

    class OptionalBuild(BuildExtension):
        """Build the kernels, or say in one line why the package goes without them."""

        def run(self):
            try:
                super().run()
            except Exception as error:  # a missing or failing compiler raises anything from OSError to RuntimeError
                self.give_up(error)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                self.give_up(error)

        def give_up(self, error):
            self.extensions.clear()  # or an in-place build would go on to copy a library that is not there
            print(f"sten: installing without the C++ kernels: {str(error).splitlines()[0]}", file=sys.stderr)

    if platform.system() == "Windows":
        flags = ["/O2", "/openmp"]  # MSVC: the portable kernels (csrc/simd_portable.h)
    else:
        flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"]
    if platform.system() == "Linux":
        flags.append("-fopenmp")  # at::parallel_for is serial without it; the runtime itself comes with libtorch
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc").glob("*.h"))
    module = CppExtension("sten._C", sources, depends=headers, extra_compile_args=flags)
    return [module], {"build_ext": OptionalBuild}


modules, commands = extension()
setup(ext_modules=modules, cmdclass=commands)
