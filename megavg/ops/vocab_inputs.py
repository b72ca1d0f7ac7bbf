"""What the vocabulary ops make of their arguments: checks with one clear error each, rows to score, gathered rows."""

from __future__ import annotations

import functools
import math
from typing import Callable

import torch
import torch.distributed as dist

from megavg.ops.vocab_rows import NATS, HeadRows, compute_dtype
from megavg.ops.vocab_shard import Merged, VocabShard


def check_head(hidden: torch.Tensor, weight: torch.Tensor, shard: VocabShard, bias: torch.Tensor | None = None) -> None:
    """Refuse shapes and dtypes that do not belong together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [N, D] and weight [Vs, D] of one width, got {tuple(hidden.shape)} and "
                         f"{tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"expected hidden and weight of one floating dtype, got {hidden.dtype} and {weight.dtype}; "
                         "cast one of them, such as hidden.to(weight.dtype)")
    if not 0 <= shard.start <= shard.stop:
        raise ValueError(f"a shard is 0 <= start <= stop, got {shard.start}..{shard.stop}")
    if weight.shape[0] != shard.stop - shard.start:
        raise ValueError(f"the head has {weight.shape[0]} rows but the shard says {shard.start}..{shard.stop}")
    if shard.vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {shard.vocab_size}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected a bias [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"expected a bias of a floating dtype, got {bias.dtype}")


def make_scale(temperature: float | torch.Tensor, num_rows: int, hidden: torch.Tensor) -> float | torch.Tensor:
    """log2 e / temperature, a number or [N] of its own memory.

    Raises:
        ValueError: a temperature that is not above 0, or not one number or one a row.
    """
    if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
        raise ValueError("the temperature requires a gradient, which this op does not give; detach it")
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {float(temperature)}")
        return 1 / (float(temperature) * NATS)
    if temperature.shape != (num_rows,):
        raise ValueError(f"expected a temperature [{num_rows}], got shape {tuple(temperature.shape)}")
    wrong = temperature[~((temperature > 0) & (temperature < math.inf))]
    if wrong.numel():
        raise ValueError(f"temperature must be above 0, got {float(wrong[0])}")
    return (1 / (temperature.double() * NATS)).to(hidden.device, compute_dtype(hidden))


def check_targets(targets: torch.Tensor, num_rows: int, shard: VocabShard, ignore_index: int,
                  sequence_parallel: bool) -> None:
    """Refuse targets that are not one id a row, inside the vocabulary or ignored."""
    if targets.shape != (num_rows,):
        of_all = ", those of all ranks" if sequence_parallel else ""
        raise ValueError(f"expected {num_rows} targets{of_all}, got shape {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"expected targets of dtype torch.int64, got {targets.dtype}")
    wrong = ((targets < 0) | (targets >= shard.vocab_size)) & (targets != ignore_index)
    if targets.numel() and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets must lie in 0..{shard.vocab_size - 1} or be {ignore_index} (ignored), got "
                         f"{int(targets[row])} in row {row}")


def make_rows(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shard: VocabShard,
              scale: float | torch.Tensor, targets: torch.Tensor | None = None,
              kept: torch.Tensor | None = None) -> HeadRows:
    """The rows to score, those at ``kept`` [k] only, with the padding rows of the head cut off."""
    columns = torch.full((hidden.shape[0],), -1, device=hidden.device) if targets is None else targets - shard.start
    columns = torch.where((columns >= 0) & (columns < shard.num_valid), columns, -1)
    bias = None if bias is None else bias[:shard.num_valid]
    rows = HeadRows(hidden, weight[:shard.num_valid], bias, columns, scale)
    return rows if kept is None else rows.select(kept)


def check_finite(merged: Merged, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                 kept: torch.Tensor | None = None) -> None:
    """One look at the results finds input that is not finite; only then are the rows ``kept``, or all, searched."""
    if bool((torch.isfinite(merged.logprobs) & torch.isfinite(merged.entropy)).all()):
        return
    kept = torch.arange(hidden.shape[0], device=hidden.device) if kept is None else kept
    rows = kept[~torch.isfinite(hidden[kept]).all(1)].tolist()
    if rows:
        raise ValueError(f"expected finite hidden states, got NaN or infinity in {len(rows)} of {hidden.shape[0]} "
                         f"rows, the first of which is row {rows[0]}")
    if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
        raise ValueError("expected a finite head, got NaN or infinity in this rank's weight or bias")
    raise ValueError("the softmax is not finite though this rank's hidden states and weight are: another rank's head "
                     "holds NaN or infinity, or products overflow")


def gather_hidden(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Rows of all ranks, in rank order."""
    if shard.world_size == 1:
        return hidden
    whole = hidden.new_empty(hidden.shape[0] * shard.world_size, hidden.shape[1])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=shard.group)
    return whole


def without_autocast(method: Callable) -> Callable:
    """A forward or backward whose products keep the dtypes they are given inside ``torch.autocast`` as well."""

    @functools.wraps(method)
    def wrapped(ctx, *args):
        device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
        with torch.autocast(device.type, enabled=False):
            return method(ctx, *args)

    return wrapped
