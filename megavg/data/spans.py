"""Refer to a member of a local tar by its place, and read it when it is needed; standard library only."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from megavg.protocols.life import goes_on

_OPEN_FILES = 32


class _OpenFile:
    """A file descriptor that closes when nobody refers to it any more, in whichever thread that is."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def version_of(descriptor: int) -> tuple[int, int, int]:
    """What tells an open file from another one that is put at its path: inode, bytes, time of change in ns."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, version: tuple[int, int, int]) -> _OpenFile:
    file = _OpenFile(path)
    if version_of(file.descriptor) != version:
        raise OSError(f"{path} was changed after its headers were read")
    return file


@dataclass(frozen=True, slots=True)
class Span:
    """``size`` bytes from ``offset`` of the file ``path``, which must be the one that ``version`` was taken of."""

    path: str
    offset: int
    size: int
    version: tuple[int, int, int]

    def read(self) -> bytes:
        """The bytes; raises ``OSError`` when the file is gone, was changed or is shorter than it was."""
        file = _opened(self.path, self.version)  # held here, so that no other thread's reading closes it
        data = os.pread(file.descriptor, self.size, self.offset)
        while data and len(data) < self.size and (more := os.pread(file.descriptor, self.size - len(data),
                                                                   self.offset + len(data))):
            data += more
        goes_on()
        if len(data) != self.size:
            raise OSError(f"{self.path} ends inside of a member: {len(data)} of {self.size} bytes at {self.offset}")
        return data
