"""The order of forwards and backwards of one optimiser step on one pipeline stage: 1F1B."""

from __future__ import annotations

from collections import deque
from typing import Any, Callable


def one_forward_one_backward(
    num_micro_batches: int,
    pp_rank: int,
    pp_size: int,
    forward: Callable[[int], Any],
    backward: Callable[[Any, bool], None],
) -> None:
    """Run ``forward(i)`` and ``backward(what forward returned, is_last)`` of every micro-batch in 1F1B order.

    A stage runs ahead by as many forwards as there are stages behind it, so at most ``pp_size - pp_rank`` activations
    are held. With one stage this is plain gradient accumulation.
    """
    ahead = min(pp_size - 1 - pp_rank, num_micro_batches)
    in_flight: deque = deque()
    num_backward = 0
    for i in range(num_micro_batches + ahead):
        if i < num_micro_batches:
            in_flight.append(forward(i))
        if i >= ahead:
            num_backward += 1
            backward(in_flight.popleft(), num_backward == num_micro_batches)
