"""Write a safetensors file while its tensors are made: one of them is in memory at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ORDER = list(_CODES)
"""Kinds of numbers as a file holds them one after the other, which keeps every tensor aligned."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be written.

    Attributes:
        name: by which it is asked for.
        stored: its name in the file.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Sequence[Entry], read: Callable[[str], torch.Tensor],
               wrote: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write what ``read(name)`` gives for each entry; the file is the one that safetensors' ``save_file`` would write.

    Raises:
        ValueError: a tensor has not the shape or dtype of its entry.
        OSError: the file cannot be written; what there is of it is left.
    """
    entries = sorted(entries, key=lambda entry: (_ORDER.index(entry.dtype), entry.stored))
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry in entries:
            tensor = read(entry.name)
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{entry.name}: expected {list(entry.shape)} in {entry.dtype}, got "
                                 f"{list(tensor.shape)} in {tensor.dtype}; the checkpoint changed while it was read")
            file.write(numbers(tensor).numpy())
            wrote(entry.num_bytes)
        file.flush()
        os.fsync(file.fileno())


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes [n] of a tensor on the CPU, as uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _header(entries: Sequence[Entry]) -> bytes:
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        stop = start + entry.num_bytes
        header[entry.stored] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
