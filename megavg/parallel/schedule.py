"""The order of forwards and backwards of one optimiser step on one pipeline stage: 1F1B."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """The forward or the backward of micro-batch ``index``."""

    is_forward: bool
    index: int


def one_forward_one_backward(num_micro_batches: int, pp_rank: int, pp_size: int) -> list[Work]:
    """Everything stage ``pp_rank`` does in one step, in order.

    A stage runs ahead by as many forwards as there are stages behind it, so at most ``pp_size - pp_rank`` activations
    are held. With one stage this is plain gradient accumulation.
    """
    ahead = min(pp_size - 1 - pp_rank, num_micro_batches)
    order = [Work(True, i) for i in range(ahead)]
    for i in range(num_micro_batches - ahead):
        order += [Work(True, ahead + i), Work(False, i)]
    return order + [Work(False, i) for i in range(num_micro_batches - ahead, num_micro_batches)]
