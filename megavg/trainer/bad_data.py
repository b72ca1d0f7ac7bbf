"""End a run on all ranks together, with one message, when one of them meets data that cannot be used."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch.distributed as dist

from megavg.parallel.context import ParallelContext


class BadData(ValueError):
    """A sample or a checkpoint cannot be used; the message names it and the remedy. Raised on every rank."""


@contextlib.contextmanager
def told_to_all(context: ParallelContext) -> Iterator[None]:
    """Turn a ValueError of any rank inside the block into ``BadData`` on all of them.

    The others would otherwise wait in the next collective until its time-out. All ranks must come through the block;
    one small collective is spent at its end.
    """
    error = None
    try:
        yield
    except ValueError as caught:
        error = caught
    messages: list = [None if error is None else str(error)]
    if context.world_size > 1:
        mine, messages = messages[0], [None] * context.world_size
        dist.all_gather_object(messages, mine)
    messages = [message for message in messages if message is not None]
    if messages:
        raise BadData(messages[0]) from error
