"""CUDA C++ that is compiled at run time, by NVRTC through cuda-bindings, which torch's wheels for CUDA require.

A kernel is the function of a file ``cuda/<name>.cu`` that has the file's name; integer macros specialize it. What
several share is in ``cuda/common.cuh``.

| step | makes | kept |
|---|---|---|
| ``compiled`` | machine code for an architecture | on disk: by source, macros, architecture, NVRTC and driver |
| ``function`` | the handle of the kernel on a GPU | until the process ends, as loaded code is |
| ``cuda_launch`` | a ``Launch`` | by its owner, as Triton's are |

The files are in ``cuda``, a folder of ``STEN_CACHE_DIR`` (default ``~/.cache/sten``). One that is damaged is compiled
again, a folder that cannot be written only means that the next process compiles again.
"""

import ctypes
import functools
import hashlib
import importlib
import os
import pathlib
import struct
import tempfile
import warnings

import torch

from .autotune import cache_folder
from .backend import INTERPRET, backend
from .launch import Launch

SOURCES = pathlib.Path(__file__).parent / "cuda"
OLDEST = (8, 0)  # which has cp.async
DIGEST = 32  # bytes of a SHA-256, before the code in a file
BUFFER, BUFFER_SIZE, END = 1, 2, 0  # CU_LAUNCH_PARAM_*
CONFIG, ATTRIBUTE = struct.Struct("7I4xPPI4x"), struct.Struct("i4xi60x")  # CUlaunchConfig, CUlaunchAttribute
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: PDL, see ``begin`` in common.cuh
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_*
INVALID_CONTEXT = 201  # CUDA_ERROR_*


def available(shared: int = 0) -> bool:
    """Whether kernels can be compiled for the current GPU, and run, with so many bytes of shared memory. Where they
    should but cannot, one warning says why, and products take another variant."""
    if INTERPRET or not torch.cuda.is_available():
        return False
    index = backend.device()
    device = torch.device("cuda", index)
    fits = shared == 0 or shared <= backend.shared_memory(device)
    return backend.capability(device) >= OLDEST and fits and _works(index)


@functools.cache
def _works(device: int) -> bool:
    try:
        function("probe", (), 0, device)
    except (ImportError, OSError, RuntimeError) as problem:
        warnings.warn(
            f"sten: the CUDA C++ kernels cannot be compiled and run on GPU {device}; slower ones are used. {problem}",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _driver():
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    driver.cuLaunchKernelEx.argtypes = [pointer] * 4
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    driver.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    driver.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    return driver


def _expect_success(kernel: str, call: str, status: int) -> None:
    if status != 0:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        got = (name.value or b"an unknown error").decode()
        raise RuntimeError(f"Expected {call} of the CUDA kernel {kernel!r} to succeed, got {got}.")


@functools.cache
def function(kernel: str, macros: tuple[tuple[str, int], ...], shared: int, device: int) -> int:
    """The handle of a kernel, with so many bytes of dynamic shared memory, on this GPU, which is the current one."""
    backend.initialize()
    major, minor = backend.capability(torch.device("cuda", device))
    architecture = f"sm_{major}{minor}{'a' if major >= 9 else ''}"  # a: what one generation alone has, such as wgmma
    version = ctypes.c_int()
    _expect_success(kernel, "cuDriverGetVersion", _driver().cuDriverGetVersion(ctypes.byref(version)))
    code = compiled(kernel, macros, architecture, version.value)
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _expect_success(kernel, "cuModuleLoadData", _driver().cuModuleLoadData(ctypes.byref(module), code))
    found = _driver().cuModuleGetFunction(ctypes.byref(handle), module, kernel.encode())
    _expect_success(kernel, "cuModuleGetFunction", found)
    given = _driver().cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    _expect_success(kernel, "cuFuncSetAttribute", given)
    return handle.value


def compiled(kernel: str, macros: tuple[tuple[str, int], ...], architecture: str, driver: int = 0) -> bytes:
    """The machine code of a kernel, from the disk or by NVRTC."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    sources = {path.name.encode(): path.read_bytes() for path in (SOURCES / f"{kernel}.cu", SOURCES / "common.cuh")}
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-D{name}={value}" for name, value in macros]
    _, *version = nvrtc.nvrtcVersion()
    key = hashlib.sha256(repr((sources, options, version, driver)).encode()).hexdigest()
    folder = cache_folder()
    path = None if folder is None else folder / "cuda" / f"{kernel}-{key}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(nvrtc, kernel, sources, options)
        _write(path, code)
    return code


def _compile(nvrtc, kernel: str, sources: dict[bytes, bytes], options: list[str]) -> bytes:
    (name, source), *headers = sources.items()
    names, contents = [name for name, _ in headers], [content for _, content in headers]
    _, program = nvrtc.nvrtcCreateProgram(source, name, len(headers), contents, names)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(program)
        raise RuntimeError(
            f"Expected the CUDA kernel {kernel!r} to compile with {' '.join(options)}, got {status.name}:\n"
            f"{log.rstrip(bytes(1)).decode(errors='replace')}"
        )
    code = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _read(path: pathlib.Path | None) -> bytes | None:
    try:
        content = b"" if path is None else path.read_bytes()
    except OSError:  # there is none, or it cannot be read
        return None
    digest, code = content[:DIGEST], content[DIGEST:]
    return code if digest == hashlib.sha256(code).digest() else None


def _write(path: pathlib.Path | None, code: bytes) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.close()  # all of it is written before it gets its name
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        pass  # a read-only home, a full disk: the next process compiles again


class CudaKernel:
    """The ``compile`` of a ``Launch``: its first call compiles and loads, and all of them start the kernel."""

    def __init__(self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, macros: dict[str, int]):
        self.kernel, self.grid, self.threads, self.shared = kernel, grid, threads, shared
        self.macros = tuple(sorted(macros.items()))

    def __call__(self, arguments):
        device = backend.device()
        handle = function(self.kernel, self.macros, self.shared, device)
        overlaps = backend.capability(torch.device("cuda", device))[0] >= 9
        driver_call = _driver().cuLaunchKernelEx if overlaps else _driver().cuLaunchKernel
        start = starter(self.kernel, driver_call, handle, self.threads, self.shared, arguments, overlaps)
        start(*self.grid, backend.stream(device), *arguments)
        return start, (), (), {}


def starter(kernel: str, launch, handle: int, threads: int, shared: int, arguments, overlaps: bool = False):
    """``start(x, y, z, stream, *arguments)`` for arguments like these: integers, and tensors or None, as addresses.

    ``launch`` is the driver's cuLaunchKernel, or, if it ``overlaps`` the end of the kernel before, cuLaunchKernelEx.
    Each call packs arguments of its own, as several threads may launch at once; the driver copies them.
    """
    form, extra, address = "".join("i" if isinstance(a, int) else "P" for a in arguments), "0P5P", ctypes.addressof
    end = struct.calcsize(form)
    options_at, config_at = struct.calcsize(f"{form}0P"), struct.calcsize(form + extra)
    whole = struct.Struct(form + extra + (CONFIG.format if overlaps else ""))
    pack_into, memory = whole.pack_into, ctypes.c_char * whole.size
    size, attribute = ctypes.c_size_t(end), ctypes.create_string_buffer(ATTRIBUTE.pack(PROGRAMMATIC, 1))
    size_at, attribute_at = address(size), address(attribute)

    def start(x, y, z, stream, *arguments, _alive=(size, attribute)):  # to which the addresses point
        addresses = [a if a.__class__ is int else 0 if a is None else a.data_ptr() for a in arguments]
        packed = memory()
        at = address(packed)
        options = BUFFER, at, BUFFER_SIZE, size_at, END
        if overlaps:
            config = x, y, z, threads, 1, 1, shared, stream, attribute_at, 1
            pack_into(packed, 0, *addresses, *options, *config)
            given = at + config_at, handle, None, at + options_at
        else:
            pack_into(packed, 0, *addresses, *options)
            given = handle, x, y, z, threads, 1, 1, shared, stream, None, at + options_at
        status = launch(*given)
        if status == INVALID_CONTEXT:  # of a thread that has not used the GPU yet
            backend.initialize()
            status = launch(*given)
        _expect_success(kernel, "cuLaunchKernel", status)

    return start


def cuda_launch(kernel: str, grid: tuple[int, ...], threads: int, shared: int = 0, **macros: int) -> Launch:
    """The launch of a CUDA kernel with these macros, on CTAs of so many threads and bytes of dynamic shared memory."""
    grid = (*grid, 1, 1)[:3]
    return Launch(CudaKernel(kernel, grid, threads, shared, macros), grid)
