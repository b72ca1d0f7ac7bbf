"""All data-parallel ranks of a source in one process: side by side, or in threads that exchange what ranks exchange."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

from PIL import Image


class Exchange:
    """``agree`` for ``count`` threads: joins their lists in rank order on each. A rank that is missing fails the test.

    Attributes:
        sent: what each rank gave, in its order.
    """

    def __init__(self, count: int):
        self._barrier = threading.Barrier(count, timeout=30)
        self._parts: list[list] = [[] for _ in range(count)]
        self.sent: list[list[list]] = [[] for _ in range(count)]

    def agree_of(self, rank: int) -> Callable[[list], list]:
        def agree(values: list) -> list:
            self._parts[rank] = values
            self.sent[rank].append(list(values))
            self._barrier.wait()
            joined = [value for part in self._parts for value in part]
            self._barrier.wait()
            return joined
        return agree


def in_threads(ranks: list, function: Callable[[Any], Any]) -> list:
    """``function(rank)`` of all ranks at once; what it raised stands in the place of a result."""
    def call(rank):
        try:
            return function(rank)
        except Exception as error:
            return error
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def keys(batch: list) -> list[str]:
    return [sample.key for sample in batch]


def joined(shares: list[list]) -> list:
    """The global batch that the ranks' shares were cut from."""
    batch = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        batch[rank::len(shares)] = share
    return batch


def write_tar(path: Path, good: list[bool]) -> str:
    """A tar of one small record per flag, of which those with a False do not decode."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 10), (10, 200, 30)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, flag in enumerate(good):
            fields = {"width": 20, "height": 10, "expression": "it", "boxes_xyxy_px": [[1, 2, 5, 6]]}
            for suffix, data in (("json", json.dumps(fields).encode()), ("png", picture.getvalue() if flag else b"?")):
                member = tarfile.TarInfo(f"{path.stem}r{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)
