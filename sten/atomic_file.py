"""Writing a file in one step: a process that is killed at any byte leaves the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Recorder(io.FileIO):
    """A file that notes why a write failed, because writers in C++ raise errors of their own."""

    error: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path` if the block succeeds: written beside it, fsynced and moved.

    Permissions are those of a new file under the umask. A symlink stays, and its target is replaced. What a killed
    process left beside `path` is removed.

    Raises:
        FileNotFoundError: the folder does not exist.
        PermissionError: the file, or its folder, must not be written.
        ValueError: `path` is no regular file (a folder, a FIFO, a device).
        OSError: the disk is full, or another error of the system; the old file is unchanged.
    """
    target = Path(os.path.realpath(path))
    _expect_replaceable(path, target)
    _remove_leftovers(target)
    raw, temporary = _new_file(target)
    file = io.BufferedWriter(raw, 2**20)
    try:
        try:
            yield file
            file.flush()
            os.fsync(raw.fileno())
            os.replace(temporary, target)
        except Exception as error:
            cause = raw.error or (error if isinstance(error, OSError) else None)
            if cause is None or cause.errno not in FULL:
                raise
            written = raw.tell() >> 20
            raise OSError(
                cause.errno,
                f"Expected space for the file, got a full disk or quota after {written} MiB; free some space, or save "
                "elsewhere (the old file is unchanged)",
                os.fspath(path),
            ) from error
        _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            file.detach()
        temporary.unlink(missing_ok=True)
        raw.close()


def _expect_replaceable(path: str | os.PathLike, target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Expected an existing folder for {target.name!r}, got {os.fspath(target.parent)!r}; make it first."
        )
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"Expected a regular file to write, got {kind} at {os.fspath(path)!r}; choose another path.")
    if not mode & 0o222 or not os.access(target, os.W_OK):  # root may write what nobody may
        raise PermissionError(
            errno.EACCES, "Expected a file that may be written, got a read-only one; chmod it", os.fspath(path)
        )


def _new_file(target: Path) -> tuple[_Recorder, Path]:
    """A new file beside `target`, locked while this process writes it."""
    while True:
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(6)}.part")
        raw = _Recorder(
            os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666), "wb"
        )
        if fcntl is not None:
            fcntl.flock(raw, fcntl.LOCK_EX)
        if temporary.exists():  # another process may have taken it for a leftover before it was locked
            return raw, temporary
        raw.close()


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left: the files that nobody has locked."""
    if fcntl is None:
        return
    for path in target.parent.glob(f"{_escaped(target.name)}.*.part"):
        if not path.is_file() or path.is_symlink():
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is being written
            path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    """Have the folder's new entry on the disk, where a folder can be opened."""
    if os.name == "posix":
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
