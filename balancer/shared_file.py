"""Files that several processes map: opened safely, made ready under a lock, and never changed in layout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class BoardError(RuntimeError):
    """The board, or the counters beside it, cannot be opened or has no room; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file has to begin with, and its size; `name` is what people call it."""

    name: str
    head: bytes
    size_bytes: int


@contextlib.contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Only those who make, claim or remove take the lock, never those who read or write records."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def ready(path: Path, layout: Layout) -> Iterator[int]:
    """The locked file at `path`, made (mode 0600) when it is missing or of another layout.

    Raises BoardError when it belongs to another user, is no regular file, or the file system is full.
    """
    while True:
        with opened(path, layout) as descriptor, locked(descriptor):
            if _made_ready(path, layout, descriptor):
                yield descriptor
                return


@contextlib.contextmanager
def opened(path: Path, layout: Layout) -> Iterator[int]:
    """The file as it is, or an empty one. Raises BoardError as `ready` does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BoardError(f"cannot open the {layout.name} {path}: {error.strerror}; remove that file") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BoardError(f"cannot open the {layout.name} {path}: it is not a regular file; remove it")
        if found.st_uid != os.geteuid():
            mend = "remove it or name the application otherwise"
            raise BoardError(f"the {layout.name} {path} belongs to another user; {mend}")
        yield descriptor
    finally:
        os.close(descriptor)


def _made_ready(path: Path, layout: Layout, descriptor: int) -> bool:
    """Whether the locked file has the layout and is still at `path`; one of another layout is removed, never
    overwritten: whoever has mapped it keeps it, and sees that it was replaced."""
    found = os.fstat(descriptor)
    if not found.st_nlink:
        return False
    if not found.st_size:
        _initialise(path, layout, descriptor)
    elif found.st_size != layout.size_bytes or os.pread(descriptor, len(layout.head), 0) != layout.head:
        path.unlink()
        return False
    return True


def _initialise(path: Path, layout: Layout, descriptor: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, layout.size_bytes)
    except OSError as error:
        os.ftruncate(descriptor, 0)
        wanted = f"cannot make the {layout.name} {path} of {layout.size_bytes} bytes"
        raise BoardError(f"{wanted}: {error.strerror}; free shared memory") from error
    os.pwrite(descriptor, layout.head, 0)
