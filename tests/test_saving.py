"""Writing files: killed at any byte, full disks, permissions, symlinks, leftovers; how much memory it takes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
import torch
from masked import expect_close, state
from small import mlp
from torch import nn

import sten
from sten.atomic_file import replacing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def save(model: nn.Module, path) -> None:
    sten.save(model, path)


def save_run(model: nn.Module, path) -> None:
    sten.save_run(model, path, torch.optim.SGD(model.parameters(), 0.1))


def load(path, kind) -> nn.Module:
    model = sten.sparsify(mlp(), sten.CSR(), sparsity=0.7)
    if kind is save:
        return sten.load(model, path)
    sten.load_run(model, path, torch.optim.SGD(model.parameters(), 0.1))
    return model


both = pytest.mark.parametrize("kind", [save, save_run])


def sparse(seed: int = 0) -> nn.Module:
    model = sten.sparsify(mlp(), sten.CSR(), sten.Random(seed), sparsity=0.7)
    with torch.no_grad():
        model[0].bias.fill_(seed)
    return model


def in_child(act) -> int:
    """The status of a forked process that does this."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@both
def test_killed_at_any_byte(kind, tmp_path):
    """The kernel kills the writer at a byte of its choice: the old file is whole, and the next save clears up."""
    path = tmp_path / "m"
    kind(sparse(1), path)
    old, size = state(load(path, kind)), path.stat().st_size

    def die(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        kind(sparse(2), path)

    for limit in [*range(0, size, max(1, size // 20)), size - 1]:
        assert in_child(lambda limit=limit: die(limit)) & 127 == signal.SIGXFSZ
        expect_close(state(load(path, kind)), old, 0, 0)
        assert len(list(tmp_path.iterdir())) == 2  # what it left is there, once: each save removes that of the last
    assert in_child(lambda: die(2 * size)) == 0
    expect_close(state(load(path, kind)), state(sparse(2)), 0, 0)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


@both
def test_a_full_disk_is_reported(kind, tmp_path):
    path = tmp_path / "m"
    kind(sparse(1), path)
    old = path.read_bytes()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # EFBIG, as ENOSPC: Python ignores SIGXFSZ
        with pytest.raises(OSError, match=r"full disk or quota .* free some space") as caught:
            kind(sparse(2), path)
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)

    assert in_child(fill) == 0
    assert path.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["m"]


@both
def test_permissions_are_those_of_the_umask(kind, tmp_path):
    before = os.umask(0o027)
    try:
        kind(sparse(), tmp_path / "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640


@both
def test_a_symlink_stays(kind, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "m")
    for seed in (1, 2):
        kind(sparse(seed), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        expect_close(state(load(tmp_path / "folder" / "m", kind)), state(sparse(seed)), 0, 0)


@both
def test_what_must_not_be_replaced_is_refused(kind, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "read-only").write_text("precious")
    (tmp_path / "read-only").chmod(0o444)
    names = sorted(f.name for f in tmp_path.iterdir())
    for path, error, match in (
        (tmp_path / "fifo", ValueError, "got a FIFO"),
        (tmp_path, ValueError, "got a folder"),
        ("/dev/null", ValueError, "got a device"),
        (tmp_path / "read-only", PermissionError, "got a read-only one"),
        (tmp_path / "nowhere" / "m", FileNotFoundError, "Expected an existing folder"),
    ):
        with pytest.raises(error, match=match):
            kind(sparse(), path)
    assert (tmp_path / "read-only").read_text() == "precious"
    assert sorted(f.name for f in tmp_path.iterdir()) == names


def test_a_leftover_is_removed_and_a_writer_is_not(tmp_path):
    """Two processes may save to one path: only what nobody writes any more is a leftover."""
    (tmp_path / "m.0123.part").write_bytes(b"half")
    (tmp_path / "other.0123.part").write_bytes(b"of another file")
    with replacing(tmp_path / "m") as file:
        file.write(b"slow")
        sten.save(sparse(1), tmp_path / "m")
        left = sorted(f.name for f in tmp_path.iterdir())
        assert left[0] == "m" and len(left) == 3 and "other.0123.part" in left and "m.0123.part" not in left
    assert (tmp_path / "m").read_bytes() == b"slow"


@both
def test_a_failed_save_leaves_nothing(kind, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": lambda: 1}  # neither a tensor nor a pickle

        def set_extra_state(self, state):
            pass

    with pytest.raises(Exception, match=r"extra_state|pickle"):
        kind(Extra(2, 2), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors", ".zip", ".json", ".gguf"])
def test_a_run_under_any_suffix(suffix, tmp_path):
    path = tmp_path / f"run{suffix}"
    save_run(sparse(3), path)
    expect_close(state(load(path, save_run)), state(sparse(3)), 0, 0)


MEMORY = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, sten
from torch import nn
torch.set_num_threads(1)

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

path = sys.argv[1]
small = sten.sparsify(nn.Sequential(nn.Linear(8, 8)), sten.CSR(), sparsity=0.5)  # so that all code is loaded
sten.save(small, path + "1")
sten.load(small, path + "1")
sten.trainable(small)
sten.save_run(small, path + "1", torch.optim.SGD(small.parameters(), 0.1))
sten.load_run(small, path + "1", torch.optim.SGD(small.parameters(), 0.1))
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 2000))
acts = {
    "load": lambda: sten.load(model, path, assign=True),
    "save": lambda: sten.save(model, path),
    "save_run": lambda: sten.save_run(sten.trainable(model), path + "2", torch.optim.SGD(model.parameters(), 0.1)),
    "load_run": lambda: sten.load_run(model, path + "2", torch.optim.SGD(model.parameters(), 0.1)),
    "load again": lambda: sten.load(model, path),
}
for name, act in acts.items():
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak from now on
    act()
    print(name, (status("VmHWM") - before) / os.path.getsize(path), sep=":")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux resets the peak")
def test_memory(tmp_path):
    """At most 1.2 of the stored bytes: what is read is what the model keeps, and what is saved is not copied."""
    layers = [nn.Linear(2000, 2000) for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(sten.from_dense(layer.weight.detach(), sten.CSR(), torch.rand(2000, 2000) < 0.5))
    sten.save(nn.Sequential(*layers), tmp_path / "m")
    program = [sys.executable, "-c", MEMORY, str(tmp_path / "m")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shares = dict(line.split(":") for line in done.stdout.splitlines())
    assert len(shares) == 5 and all(float(share) <= 1.2 for share in shares.values()), shares
