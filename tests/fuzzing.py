"""Mutated state dicts, pickles and files through every way into sten: an equal or a working model, or FormatError.

    python -m tests.fuzzing --count 100000 --seed 0     what `make fuzz` runs, in all processes together

Each trial is a function of its number, so that a failure is repeated by `--first N --count 1`. A trial fails on any
other error than the documented one, on a change after a refusal, on a model that does not work after it was accepted,
on memory (an address space of 2 GiB more than at the start) and on time (60 s).
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import warnings

import torch
from torch import Tensor, nn

import sten
from sten import tensor_file
from sten.layouts.registry import fields
from sten.tensor import _load

LAYOUTS = [
    sten.Masked(), sten.CSR(), sten.BSR((4, 4)), sten.NM(2, 4), sten.VectorNM(1, 4, 4), sten.GroupedNM(2, 4, 1),
    sten.FanIn(),
]  # fmt: skip
METHODS = {
    "RigL": (sten.CSR(), sten.RigL(99, every=2)), "SET": (sten.BSR((4, 4)), sten.SET(99, every=2)),
    "SparseMomentum": (sten.CSR(), sten.SparseMomentum(99, every=2)), "SRigL": (sten.FanIn(), sten.SRigL(99, every=2)),
    "Gradual": (sten.CSR(), sten.Gradual(1, 50, every=2)), "SRSTE": (sten.NM(2, 4), sten.SRSTE()),
    "BiMask": (sten.NM(2, 4), sten.BiMask(refresh=2, tries=2)),
}  # fmt: skip
FORMS = ["finalized", "trainable", *METHODS]
JUNK = [
    None, -1, 0, 1, 2**63, 10**400, 1.5, float("nan"), "x", [], {}, True, torch.ones(3), torch.ones(0), (1, 2), b"x",
    torch.tensor(-1), torch.zeros(5056, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.complex64), [1] * 99,
]  # fmt: skip
NUMBERS = [-(2**31), -1, 0, 1, 3, 7, 11, 12, 19, 20, 200, 2**15 - 1, 2**31 - 1]
NAMES = ["extra", "step", "mask", "0.weight", "0.weight.col", "0.weight.values", "0.weight_pattern.col"]
ATTRIBUTES = ["parts", "part_col", "sparse_layout", "cache", "__dict__", "stored_shape", "transposed", "trained"]


class Failed(AssertionError):
    """A trial that did not end as documented."""


def dense() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def step(model: nn.Module, optimizer, number: int) -> None:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


@functools.cache
def made(form: str, number: int) -> nn.Module:
    """A model of this form; `number` chooses its layout and its pattern."""
    model = dense()
    if form in METHODS:
        layout, method = METHODS[form]
        optimizer = torch.optim.Adam(model.parameters())
        sten.sparsify(model, layout, method, sparsity=None if layout.rate else 0.5, optimizer=optimizer)
        for i in range(4 + number % 2):
            step(model, optimizer, i)
        return copy.deepcopy(model)
    layout = LAYOUTS[number % len(LAYOUTS)]
    sten.sparsify(model, layout, sten.Random(number % 2), sparsity=None if layout.rate else 0.6)
    return sten.trainable(model) if form == "trainable" else model


def fresh(form: str, number: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(made(form, number))
    optimizer = torch.optim.Adam(model.parameters())
    if form in METHODS:
        sten.attach(model, optimizer)
    return model, optimizer


# mutations


def mutated_tensor(r: random.Random, t: Tensor) -> object:
    if isinstance(t, sten.SparseTensor):
        parts = {n: part.clone() if isinstance(part, Tensor) else part for n, part in t.parts.items()}
        parts = mutated(r, parts)
        try:
            return sten.SparseTensor(t.sparse_layout, parts, t.stored_shape, r.random() < 0.1)
        except Exception:  # no tensor at all
            return r.choice(JUNK)
    kind = r.randrange(12) if t.layout is torch.strided else 12
    if kind < 5 and t.numel():
        new = t.clone().contiguous()
        for _ in range(r.randrange(1, 4)):
            number = r.choice(NUMBERS)
            if not t.dtype.is_floating_point and not t.dtype.is_complex and t.dtype != torch.bool:
                info = torch.iinfo(t.dtype)
                number = max(info.min, min(number, info.max))
            new.view(-1)[r.randrange(t.numel())] = number
        return new
    changes = [
        lambda: t[:-1], lambda: t.double(), lambda: t.to(torch.int32), lambda: t.reshape(-1), lambda: t.unsqueeze(0),
        lambda: t.to("meta"), lambda: torch.full_like(t, float("nan")), lambda: torch.cat([t, t]),
        lambda: torch.zeros(1, dtype=t.dtype).as_strided(t.shape, [0] * t.dim()), lambda: t.flip(0), lambda: t.t(),
        lambda: t.to_sparse(), lambda: t.view(torch.uint8).view(torch.float32), lambda: torch.zeros_like(t),
    ]  # fmt: skip
    try:
        return r.choice(changes)()
    except Exception:  # not for this tensor
        return r.choice(JUNK)


def mutated(r: random.Random, tree, depth: int = 0):
    """A copy with one random place changed."""
    if isinstance(tree, dict) and tree and (depth == 0 or r.random() < 0.95):
        new, key, chance = dict(tree), r.choice(list(tree)), r.random()
        if chance < 0.08:
            del new[key]
        elif chance < 0.13:
            new[r.choice(NAMES)] = r.choice([*JUNK, *tree.values()])
        elif chance < 0.2:
            new[key] = new[r.choice(list(tree))]  # another entry: of the wrong shape, or over the same memory
        else:
            new[key] = mutated(r, tree[key], depth + 1)
        return new
    if isinstance(tree, list) and tree and (depth == 0 or r.random() < 0.8):
        new, i, chance = list(tree), r.randrange(len(tree)), r.random()
        if chance < 0.2 and depth:
            return new[:i] + new[i + 1 :] if chance < 0.1 else [*new, new[i]]
        new[i] = mutated(r, tree[i], depth + 1)
        return new
    if isinstance(tree, Tensor) and r.random() < 0.85:
        return mutated_tensor(r, tree)
    if type(tree) is int and r.random() < 0.7:
        return r.choice([*NUMBERS, tree + 1, tree - 1, 2**62])
    return r.choice(JUNK)


# what must hold afterwards


def snapshot(model: nn.Module) -> dict:
    out = {}
    for key, value in model.state_dict().items():
        parts = value.parts if isinstance(value, sten.SparseTensor) else {"": value}
        out |= {(key, name): part.detach().clone() for name, part in parts.items()}
    return out


def same(a: dict, b: dict) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and x.dtype == y.dtype and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def same_tree(a, b) -> bool:
    if isinstance(a, Tensor):
        return same({"": a}, {"": b})
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b


def expect_working(model: nn.Module, optimizer=None) -> None:
    """Its patterns are valid, and it computes, and trains where it can."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return  # assign=True with entries on meta is what the caller asked for
    for layer in (model[0], model[2]):
        if isinstance(layer.weight, sten.SparseTensor):
            layer.weight.sparse_layout.validate(layer.weight.detach().parts, layer.weight.stored_shape)
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return  # assign=True takes the dtypes of the entries
    model(torch.ones(3, 12))
    if optimizer is not None and torch.rand(()) < 0.3:
        for i in range(3):
            step(model, optimizer, i)
            for p in model.parameters():  # what NaN did is torch's
                p.data.nan_to_num_(0, 1, -1)


# the ways in: each returns what happened


def state_dict(r: random.Random) -> str:
    form, number = r.choice(FORMS), r.randrange(28)
    source = made(form if r.random() < 0.8 or form in METHODS else r.choice(FORMS[:2]), number + 7 * r.randrange(2))
    state = dict(copy.deepcopy(source.state_dict()))
    for _ in range(r.randrange(1, 4)):
        state = mutated(r, state)
    model, optimizer = fresh(form, number)
    before = snapshot(model)
    strict, assign = r.random() < 0.5, r.random() < 0.3
    try:
        model.load_state_dict(state, strict=strict, assign=assign)
    except sten.FormatError:
        if not same(before, snapshot(model)):
            raise Failed("changed after a refusal") from None
        expect_working(model, optimizer)
        return "refused"
    except RuntimeError as error:
        lines = str(error).splitlines()[1:]
        if type(error) is not RuntimeError or not all("key(s) in state_dict" in line for line in lines):
            raise Failed(f"{type(error).__name__}: {error}") from error
        expect_working(model)
        return "names, by torch"
    expect_working(model, None if assign else optimizer)
    return "accepted"


class Pickled:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


def pickled(r: random.Random) -> str:
    w = made("finalized", r.randrange(28))[0].weight.detach()
    layout = w.sparse_layout
    parts = {name: part.clone() for name, part in w.parts.items()}
    call = [type(layout).__name__, fields(layout), parts, list(w.shape), False, False, False]
    for _ in range(r.randrange(1, 4)):
        call = mutated(r, call)
    if isinstance(call[3], list):
        call[3] = tuple(call[3])
    reduced = _load, tuple(call)
    if r.random() < 0.3:
        state = {r.choice(ATTRIBUTES): mutated(r, dict(parts))}
        reduced = r.choice([
            (torch._tensor._rebuild_from_type_v2, (_load, sten.SparseTensor, tuple(call), state)), (*reduced, state),
            (torch._utils._rebuild_parameter_with_state, (Pickled(*reduced), False, collections.OrderedDict(), state)),
        ])  # fmt: skip
    buffer = io.BytesIO()
    try:
        torch.save(Pickled(*reduced), buffer)
    except (RuntimeError, OverflowError):
        return "not to be saved"  # one storage with two dtypes, say
    buffer.seek(0)
    try:
        got = torch.load(buffer, weights_only=True)
    except sten.FormatError:
        return "refused"
    if got.numel() < 10**6 and not got.is_meta:
        got.sparse_layout.validate(got.parts, got.stored_shape)
        if got.dim() == 2:
            torch.nn.functional.linear(torch.ones(3, got.shape[1], dtype=got.dtype), got)
    return "accepted"


@functools.cache
def folder() -> str:
    return tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


@functools.cache
def saved(form: str, number: int) -> bytes:
    path = f"{folder()}/saved-{os.getpid()}"
    if form in METHODS:
        model, optimizer = fresh(form, number)
        step(model, optimizer, 9)
        sten.save_run(model, path, optimizer, epoch=3)
    else:
        sten.save(made(form, number), path)
    with open(path, "rb") as file:
        return file.read()


def content(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = f"{folder()}/content-{os.getpid()}"
    with open(path, "wb") as file:
        file.write(data)
    with tensor_file.open_file(path) as file:
        header = tensor_file.read_header(file)
        return tensor_file.read(file, header), header.metadata


def file_by_content(r: random.Random) -> str:
    """Tensors or description changed, and the checksums made right."""
    form, number, path = r.choice(FORMS[:2]), r.randrange(28), f"{folder()}/file-{os.getpid()}"
    tensors, metadata = content(saved(form, number))
    for _ in range(r.randrange(1, 3)):
        if r.random() < 0.5:
            tensors = mutated(r, tensors)
        else:
            metadata = {**metadata, "sten": json.dumps(mutated(r, json.loads(metadata["sten"])), default=str)}
    plain = {n: t for n, t in tensors.items() if type(t) is Tensor and t.layout == torch.strided and not t.is_meta}
    try:
        tensor_file.write(path, plain, metadata)
    except ValueError:
        return "not to be saved"
    return loaded(path, form, number, None)


def file_by_bytes(r: random.Random) -> str:
    form, number, path = r.choice(FORMS[:2]), r.randrange(28), f"{folder()}/file-{os.getpid()}"
    with open(path, "wb") as file:
        file.write(mutated_bytes(r, saved(form, number)))
    return loaded(path, form, number, made(form, number))


def mutated_bytes(r: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    for _ in range(r.randrange(1, 4)):
        kind, place = r.randrange(6), r.randrange(max(1, min(len(new), r.choice([64, 1000, 10**9]))))
        if kind == 0:
            del new[place:]
        elif kind == 1:
            del new[place : place + r.randrange(1, 50)]
        elif kind == 2:
            new[place:place] = bytes(r.randrange(256) for _ in range(r.randrange(1, 50)))
        elif len(new) > place:
            new[place] = r.choice([new[place] ^ (1 << r.randrange(8)), r.randrange(256), 0x30 + r.randrange(10)])
    return bytes(new)


def loaded(path: str, form: str, number: int, want: nn.Module | None) -> str:
    model, before = dense(), None
    if number % 3 == 0:
        model, _ = fresh(form, number)
    before = snapshot(model)
    try:
        sten.load(model, path)
    except sten.FormatError:
        if not same(before, snapshot(model)):
            raise Failed("changed after a refusal") from None
        expect_working(model)
        return "refused"
    expect_working(model)
    if want is not None and not same(snapshot(sten.finalize(copy.deepcopy(want))), snapshot(model)):
        raise Failed("another model than the one saved")
    sten.inspect(path)
    return "accepted"


def run_file(r: random.Random) -> str:
    """A file of save_run, changed in its bytes or in its content."""
    form, number, path = r.choice(list(METHODS)), r.randrange(2), f"{folder()}/run-{os.getpid()}"
    data = saved(form, number)
    if r.random() < 0.3:
        data = mutated_bytes(r, data)
    else:
        content = torch.load(io.BytesIO(data), weights_only=True)
        for _ in range(r.randrange(1, 3)):
            content = mutated(r, content)
        buffer = io.BytesIO()
        try:
            torch.save(content, buffer)
        except (RuntimeError, OverflowError):
            return "not to be saved"
        data = buffer.getvalue()
    with open(path, "wb") as file:
        file.write(data)
    model, optimizer = fresh(form, number)
    step(model, optimizer, 1)
    before, slots = snapshot(model), copy.deepcopy(optimizer.state_dict())
    try:
        sten.load_run(model, path, optimizer)
    except sten.FormatError:
        if not same(before, snapshot(model)) or not same_tree(slots, optimizer.state_dict()):
            raise Failed("changed after a refusal") from None
        expect_working(model, optimizer)
        return "refused"
    expect_working(model)
    return "accepted"


WAYS = {
    "load_state_dict": state_dict, "torch.load": pickled, "sten.load, content": file_by_content,
    "sten.load, bytes": file_by_bytes, "sten.load_run": run_file,
}  # fmt: skip


def trial(number: int) -> tuple[str, str]:
    """(the way in, what happened) of one trial; Failed, or another error, where it is not as documented."""
    r = random.Random(number)
    way = r.choice(list(WAYS))
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return way, WAYS[way](r)


def work(first: int, count: int) -> tuple[collections.Counter, list[str], int]:
    """All trials of a range: counts, failures, and the growth of memory in MiB."""
    torch.set_num_threads(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: collections.Counter = collections.Counter()
    failures = []
    for number in range(first, first + count):
        signal.alarm(60)
        try:
            counts[trial(number)] += 1
        except Exception as error:
            failures.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
    signal.alarm(0)
    return counts, failures, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024


def limit_memory() -> None:
    """2 GiB more than now, so that what asks for memory that no file holds fails."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    share = -(-args.count // (args.processes * 20))
    jobs = [(i, min(share, args.first + args.count - i)) for i in range(args.first, args.first + args.count, share)]
    counts: collections.Counter = collections.Counter()
    failed, memory = [], 0
    with multiprocessing.get_context("spawn").Pool(args.processes, limit_memory) as pool:
        for some, failures, growth in pool.starmap(work, jobs, chunksize=1):
            counts, failed, memory = counts + some, failed + failures, max(memory, growth)
    for (way, outcome), number in sorted(counts.items()):
        print(f"{way:20} {outcome:20} {number:8,}")
    print(f"{sum(counts.values()):,} trials, {len(failed)} failed, at most {memory} MiB more in a process")
    for line in failed[:50]:
        print(line)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
