"""Files of named tensors in the safetensors format, read and written piece by piece. Nothing here knows sparse weights.

    8 bytes        N, little-endian
    N bytes        JSON: {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}, spaces at the end
    the rest       the tensors, contiguous, little-endian, without holes, in the order of their offsets

The metadata's "crc32" is one CRC-32 for each BLOCK bytes of the rest, 8 hexadecimal digits each, so that blocks are
checked as they are read, by several threads.
"""

from __future__ import annotations

import ctypes
import functools
import io
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .atomic_file import replacing
from .errors import FormatError

BLOCK = 2**24
HUGE = 2**21  # bytes of a huge page
PIECE = 2**20  # read or written at a time: it stays in the cache for its checksum
LARGEST_HEADER = 10**8
THREADS = hasattr(os, "preadv")  # which several threads can call on one file
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Crc32 = Callable[[Any, int], int]  # of bytes, and of what came before them


class Entry(NamedTuple):
    """One tensor of a file: `start` and `end` count bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    start: int
    size: int


def open_file(path: str | os.PathLike) -> io.FileIO:
    """The file, opened for reading; FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file of sten.save, got no file at {os.fspath(path)!r}.")
    return open(path, "rb", buffering=0)


def read_header(file: io.FileIO) -> Header:
    """The tensors' places and the metadata; FormatError unless they describe the file byte by byte."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read(file, 0, min(8, size)), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise _incomplete(file, f"its header has {length} of {size} bytes")
    try:
        header = json.loads(_read(file, 8, length).decode())
        metadata = header.pop("__metadata__", {})
        text = all(isinstance(t, str) for pair in metadata.items() for t in pair)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _incomplete(file, f"its header is no JSON: {str(error)[:100]}") from None
    if not text:
        raise _incomplete(file, "its metadata is no text")
    start = 8 + length
    tensors = {name: _entry(file, name, entry, start, size) for name, entry in header.items()}
    place = start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != place:
            raise _incomplete(file, f"byte {place} belongs to no tensor, or to two")
        place = entry.end
    if place != size:
        raise _incomplete(file, f"it has {size} bytes, its tensors end at {place}")
    return Header(tensors, metadata, start, size)


def _entry(file: io.FileIO, name: str, entry: Any, start: int, size: int) -> Entry:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 64
    if dtype is None or not lists or not all(type(n) is int and 0 <= n <= 2**62 for n in (*shape, *offsets)):
        raise _incomplete(file, f"tensor {name[:200]!r} has no known dtype, shape and place")
    count = math.prod(shape)
    first, last = start + offsets[0], start + offsets[1]
    if last - first != count * dtype.itemsize or last > size or math.prod(n for n in shape if n) > 2**62:
        raise _incomplete(file, f"tensor {name[:200]!r} of shape {shape} does not fit its {last - first} bytes")
    return Entry(dtype, tuple(shape), first, last)


def _incomplete(file: io.FileIO, why: str) -> FormatError:
    return FormatError(f"Expected a complete safetensors file, got {os.fspath(file.name)!r}: {why}.")


def _read(file: io.FileIO, start: int, length: int) -> bytearray:
    data = bytearray(length)
    _read_into(file, memoryview(data), start)
    return data


def _read_into(file: io.FileIO, place: memoryview, start: int) -> None:
    while place:
        if THREADS:
            count = os.preadv(file.fileno(), [place], start)
        else:
            file.seek(start)
            count = file.readinto(place)
        if count == 0:
            raise _incomplete(file, f"it ends at byte {start}")
        place, start = place[count:], start + count


def as_bytes(t: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(t.detach().reshape(-1).view(torch.uint8).numpy()) if t.numel() else memoryview(b"")


def read(
    file: io.FileIO, header: Header, mapped: frozenset[str] = frozenset(), crc32: Crc32 = zlib.crc32
) -> dict[str, Tensor]:
    """All tensors, each in memory of its own; those in `mapped` are pages of the file, copied when they are written.

    FormatError where a checksum of the metadata is not that of the bytes. (Files without checksums pass.)
    """
    tensors, pieces = {}, []
    private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else b""
    for name, entry in header.tensors.items():
        if name in mapped and entry.end > entry.start:
            count = (entry.end - entry.start) // entry.dtype.itemsize
            flat = torch.frombuffer(private, dtype=entry.dtype, count=count, offset=entry.start)
            tensors[name] = flat.view(entry.shape)
        else:
            tensors[name] = _empty(entry)
        pieces.append((entry.start, entry.end, None if name in mapped else as_bytes(tensors[name])))
    pieces.sort(key=lambda piece: piece[:2])
    blocks = _blocks(pieces, header.start)
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1, len(blocks)) if THREADS else 1)) as pool:
        sums = "".join(pool.map(functools.partial(_read_block, file, crc32), blocks))
    expected = header.metadata.get("crc32", sums)
    if expected != sums:
        bad = next((i for i in range(len(blocks)) if expected[8 * i : 8 * i + 8] != sums[8 * i : 8 * i + 8]), 0)
        raise FormatError(
            f"Expected tensors with the checksums of {os.fspath(file.name)!r}, got others in the block at byte "
            f"{header.start + bad * BLOCK}: the file is damaged."
        )
    return tensors


def _empty(entry: Entry) -> Tensor:
    """Memory for a tensor, in huge pages where Linux has them: to get it 4 KiB at a time takes longer than to read."""
    t, size = torch.empty(entry.shape, dtype=entry.dtype), entry.end - entry.start
    if size >= 2 * HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (t.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # advice: a kernel that does not take it says so and does nothing
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return t


def _blocks(pieces: list, start: int) -> list[list[tuple[int, int, memoryview | None]]]:
    """The pieces cut at multiples of BLOCK from `start`: (first byte, length, where to), for each block."""
    blocks: list[list[tuple[int, int, memoryview | None]]] = []
    for begin, end, place in pieces:
        done = 0
        while begin + done < end:
            number = (begin + done - start) // BLOCK
            length = min(end - begin - done, start + (number + 1) * BLOCK - begin - done)
            if number == len(blocks):
                blocks.append([])
            blocks[number].append((begin + done, length, None if place is None else place[done : done + length]))
            done += length
    return blocks


def _read_block(file: io.FileIO, crc32: Crc32, block: list[tuple[int, int, memoryview | None]]) -> str:
    total, scratch = 0, memoryview(bytearray(PIECE))
    for begin, length, place in block:
        for done in range(0, length, PIECE):
            count = min(PIECE, length - done)
            piece = scratch[:count] if place is None else place[done : done + count]
            _read_into(file, piece, begin + done)
            total = crc32(piece, total)
    return f"{total:08x}"


def write(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str], crc32: Crc32 = zlib.crc32
) -> None:
    """Write a file in one step (`replacing`). Tensors on the CPU are not copied, others one at a time."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, place = {}, 0
    for name in order:
        t = tensors[name]
        if t.dtype not in NAMES:
            raise ValueError(f"Expected a dtype that safetensors has for {name}, got {t.dtype}; convert it first.")
        size = t.numel() * t.element_size()
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [place, place + size]}
        place += size
    blocks = -(-place // BLOCK)

    def header(sums: str) -> bytes:
        text = json.dumps({"__metadata__": {**metadata, "crc32": sums}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with replacing(path) as file:
        file.write(header("0" * 8 * blocks))
        sums = [0] * blocks
        place = 0
        for name in order:
            data = as_bytes(tensors[name].detach().cpu().contiguous())
            done = 0
            while done < len(data):
                count = min(PIECE, len(data) - done, BLOCK - place % BLOCK)
                piece = bytes(data[done : done + count])  # a copy, so that another thread cannot change it in between
                sums[place // BLOCK] = crc32(piece, sums[place // BLOCK])
                file.write(piece)
                done, place = done + count, place + count
        file.seek(0)
        file.write(header("".join(f"{total:08x}" for total in sums)))
