"""End a run on all ranks together, with one message, when one of them meets data that cannot be used."""

from __future__ import annotations

import contextlib
import logging
from typing import Iterator

import torch.distributed as dist

from megavg.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


class BadData(ValueError):
    """A sample or a checkpoint cannot be used; the message names it and the remedy. Raised on every rank."""


@contextlib.contextmanager
def told_to_all(context: ParallelContext) -> Iterator[None]:
    """End the block on all ranks when it fails on one: the others would wait in the next collective until its time-out.

    A ValueError or OSError becomes ``BadData`` on all of them. Any other exception is a fault of the program: the rank
    that met it logs its traceback at once and raises it as it is, and the others raise ``BadData`` with its rank, type
    and message. All ranks must come through the block; one small collective is spent at its end. A rank that waits in
    a collective INSIDE of the block hears of it only when that one fails.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    is_fault = error is not None and not isinstance(error, (ValueError, OSError))
    mine = None
    if error is not None:
        mine = f"rank {context.rank}: {type(error).__name__}: {error}" if is_fault else str(error)
    messages: list = [mine]
    if context.world_size > 1:
        if is_fault and not isinstance(error, StopIteration):
            logger.error("%s; telling the other ranks", mine, exc_info=error)
        messages = _gathered(mine, context.world_size, error)
    if is_fault:
        raise error
    messages = [message for message in messages if message is not None]
    if messages:
        raise BadData(messages[0]) from error


def _gathered(mine: str | None, world_size: int, error: Exception | None) -> list[str | None]:
    """What every rank says; ``error`` instead, where a rank that failed cannot reach the others any more."""
    if isinstance(error, dist.DistError):
        raise error  # no collective works after it
    messages: list = [None] * world_size
    try:
        dist.all_gather_object(messages, mine)
    except Exception:
        if error is None:
            raise
        raise error
    return messages
