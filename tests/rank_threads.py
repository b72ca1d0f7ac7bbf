"""Threads that stand for data-parallel ranks and exchange what ranks exchange."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Callable


class Exchange:
    """``gather_rows`` for ``count`` threads: joins their lists in rank order on each. A rank that is missing fails the test.

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

    def context(self, rank: int) -> SimpleNamespace:
        """What a data-parallel rank's code asks of its ``ParallelContext``."""
        return SimpleNamespace(dp_size=len(self._parts), dp_rank=rank, world_size=1, gather_rows=self.agree_of(rank))


def in_threads(ranks: list, function: Callable[[Any], Any]) -> list:
    """``function(rank)`` of all ranks at once; what it raised stands in the place of a result."""
    def call(rank):
        try:
            return function(rank)
        except Exception as error:
            return error
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))
