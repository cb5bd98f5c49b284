"""Shared by the tests of the CUDA C++ kernels: what stands for the driver and the GPU where there is none."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
import triton
from triton_cases import DEVICE

from sten.kernels import launch, nvrtc

HERE, HALF = Path(__file__).parent, [torch.float16, torch.bfloat16]
F = torch.nn.functional
ACTIVATIONS = [lambda y: y, torch.relu, F.gelu, lambda y: F.gelu(y, approximate="tanh"), F.silu]
# DRIVER takes the arguments as cuLaunchKernel does, and runs the kernel on the CPU
FLAGS = os.environ.get("STEN_EMULATOR_FLAGS", "").split()  # such as -fsanitize=thread, with LD_PRELOAD=libtsan.so
DRIVER = """
template <class... Types>
int start(void (*kernel)(Types...), unsigned x, unsigned threads, unsigned shared, void** extra) {
  size_t at = 0;
  auto take = [&]<class Type>(Type* to) {
    at = (at + sizeof(Type) - 1) / sizeof(Type) * sizeof(Type);
    std::memcpy(to, (char*)extra[1] + at, sizeof(Type)), at += sizeof(Type);
  };
  std::tuple<Types...> arguments;
  std::apply([&](auto&... a) { (take(&a), ...); }, arguments);
  if (at != *(size_t*)extra[3] || threads != WARPS * 32 || shared > sizeof memory) return 1;
  std::apply([&](auto... a) { launch(kernel, x, threads, a...); }, arguments);
  for (size_t i = shared; i < sizeof memory; i++)
    if (memory[i] != (char)0xff) return 1;  // written, although it is not the CTA's
  return 0;
}
extern "C" int start(void*, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                     void*, void**, void** extra) {
  return y * z == 1 ? start(KERNEL, x, threads, shared, extra) : 1;
}
"""

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_nvrtc = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings.nvrtc"),
    reason="needs cuda-bindings and nvidia-cuda-nvrtc",
)
on_gpu = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < nvrtc.OLDEST, reason="needs a GPU of 8.0 or later"
)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="takes the place of the driver")


def emulated(folder, kernel, **macros):
    """``cuLaunchKernel`` of the kernel with these macros; its ``late`` says when asynchronous copies are done."""
    defines = [f"-D{name}={value}" for name, value in (macros | {"KERNEL": kernel}).items()]
    program, library = folder / "run.cpp", folder / "run.so"
    program.write_text(f'#include "{HERE}/cuda_emulated.h"\n#include "{nvrtc.SOURCES}/{kernel}.cu"\n{DRIVER}')
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *FLAGS, *defines]
    subprocess.run(["g++", *flags, str(program), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    start, pointer = loaded.start, ctypes.c_void_p
    start.argtypes = [pointer, *[ctypes.c_uint] * 7, pointer, pointer, pointer]
    start.late = ctypes.c_int.in_dll(loaded, "late")
    return start


def in_place_of_the_driver(monkeypatch, **kernels):
    """Launches run these emulated kernels."""
    numbers = {kernel: number for number, kernel in enumerate(kernels)}

    def start(number, *arguments):
        return [*kernels.values()][number](number, *arguments)

    monkeypatch.setattr(nvrtc, "_driver", lambda: types.SimpleNamespace(cuLaunchKernel=start))
    monkeypatch.setattr(nvrtc, "function", lambda kernel, macros, shared, device: numbers[kernel])
    monkeypatch.setattr(nvrtc, "available", lambda shared=0: True)
    monkeypatch.setattr(type(nvrtc.backend), "shared_memory", lambda self, device: 227 << 10)
    for name in ("device", "stream"):
        monkeypatch.setattr(nvrtc.backend, name, lambda *device: 0)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)


def expect_registers(folder, most, kernel, architecture, **macros):
    """The kernel compiles without a stack: no register spills, and no array of registers has an unknown index."""
    (folder / "code").write_bytes(nvrtc.compiled(kernel, tuple(macros.items()), architecture))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "code")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 ", usage) and int(re.search(r"REG:(\d+)", usage)[1]) <= most, usage
