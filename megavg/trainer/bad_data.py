"""End a run on all ranks together, with one message, when one of them meets data that cannot be used."""

from __future__ import annotations

import contextlib
from typing import Iterator

from megavg.parallel.context import ParallelContext


class BadData(ValueError):
    """A sample cannot be used; the message names the shard, the sample and the remedy. Raised on every rank."""


@contextlib.contextmanager
def told_to_all(context: ParallelContext) -> Iterator[None]:
    """Turn a ValueError of any data-parallel rank inside the block into ``BadData`` on all of them.

    The others would otherwise wait in the next collective until its time-out. All ranks must come through the block;
    one small collective is spent at its end.
    """
    error = None
    try:
        yield
    except ValueError as caught:
        error = caught
    messages = context.gather_rows([] if error is None else [str(error)])
    if messages:
        raise BadData(messages[0]) from error
