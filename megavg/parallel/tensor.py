"""What megatron-core's tensor-parallel regions leave out: copies of a shard, and rows that do not divide."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _SumOverCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, index: int, count: int, group):
        ctx.index, ctx.count, ctx.group = index, count, group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        # one slot per distinct shard: a single collective over the whole group sums all sets of copies
        slots = gradient.new_zeros(ctx.count, *gradient.shape)
        slots[ctx.index] = gradient
        dist.all_reduce(slots, group=ctx.group)
        return slots[ctx.index], None, None, None


def summed_over_copies(weight: torch.Tensor, index: int, count: int, group: dist.ProcessGroup) -> torch.Tensor:
    """``weight`` itself; in the backward its gradient is summed over the ranks of ``group`` that hold the same shard.

    Args:
        index: which of ``count`` distinct shards this rank holds a copy of.
    """
    return _SumOverCopies.apply(weight, index, count, group)


def padded_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """[N, D] -> [N', D] with zero rows at the end, N' the next multiple."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % multiple))
