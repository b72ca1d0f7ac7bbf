"""Log-prob and entropy of tokens under a head whose vocabulary rows are split over ranks, without storing logits.

With z = (h W^T + bias) / T and p = softmax(z): l = log p_y and H = -sum p log p. The forward walks through tiles of
logits and keeps four numbers a row (``vocab_shard``), which one all-gather merges over the ranks. The backward makes
the tiles anew. With upstream a = dL/dl and b = dL/dH,

    dL/dz_j = (1/T) { a [j = y] - p_j ( a + b H + b log p_j ) },

the head's gradient stays on its rank and the hidden states' gradient takes one reduction (``vocab_gradient``).
docs/vocab_op.md has the memory law, the measured figures and examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from megavg.ops.vocab_backend import load_backend
from megavg.ops.vocab_gradient import HeadGradients, HiddenReduction, ScoreGradient, sweep
from megavg.ops.vocab_inputs import (check_finite, check_head, check_targets, gather_hidden, make_rows, make_scale,
                                     without_autocast)
from megavg.ops.vocab_rows import BlockRecord, Blocks, HeadRows, LogitGradient
from megavg.ops.vocab_shard import TOP_ID, Merged, VocabShard, gather_tables, merge
from megavg.protocols.batch import IGNORE, TokenScores
from megavg.protocols.options import HeadOptions


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabShard,
    temperature: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = IGNORE,
    top1: bool = False,
    sum_squares: bool = False,
    sequence_parallel: bool = False,
    options: HeadOptions = HeadOptions(),
    blocks: Blocks | None = None,
) -> TokenScores:
    """Score each target token: log-prob and entropy under softmax((hidden weight^T + bias) / temperature).

    Args:
        hidden: [N, D], the same on all ranks of ``shard.group``. With ``sequence_parallel`` [N / world, D], this rank's
            rows in rank order: they are gathered, and their gradient is reduce-scattered.
        weight: [Vs, D], this rank's rows of the head, of hidden's dtype (fp64, fp32, bf16 or fp16).
        targets: [N] int64, token ids in 0..V-1, the same on all ranks. Rows with ``ignore_index`` score 0, have no
            gradient and cost nothing.
        shard: which rows of the head these are.
        temperature: > 0, a number or [N].
        bias: [Vs], finite.
        top1: also give the most likely token, the lowest id among equals. No gradient.
        sum_squares: also give sum p^2, whose negative log is the Renyi-2 entropy. No gradient.
        options: backend, memory for a cache, threshold below which blocks are skipped in the backward.
        blocks: size of the tiles; None takes what was the fastest.

    Returns:
        ``TokenScores`` of [N] fp32 (fp64 for fp64 input), with the same bits on all ranks and in every run. Log-probs
        and entropies are differentiable to hidden, weight and bias; rows without an upstream gradient cost nothing.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a temperature that is not above 0, input
            that is not finite, shards of the group that overlap or leave a gap.
    """
    shape_rows = hidden.shape[0] * (shard.world_size if sequence_parallel else 1) if hidden.dim() else 0
    check_head(hidden, weight, shard, bias)
    check_targets(targets, shape_rows, shard, ignore_index, sequence_parallel)
    scale = make_scale(temperature, shape_rows, hidden)
    call = _Call(shard, scale, ignore_index, top1, sum_squares, sequence_parallel, options, blocks,
                 torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)))
    outputs = _TokenScores.apply(hidden, weight, bias, targets, call)
    return TokenScores(*outputs)


@dataclass(frozen=True)
class _Call:
    """The options of one call."""

    shard: VocabShard
    scale: float | torch.Tensor
    ignore_index: int
    top1: bool
    sum_squares: bool
    sequence_parallel: bool
    options: HeadOptions
    blocks: Blocks | None
    needs_grad: bool


class _TokenScores(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, hidden, weight, bias, targets, call: _Call):
        ctx.set_materialize_grads(False)
        shard, options = call.shard, call.options
        whole = gather_hidden(hidden, shard) if call.sequence_parallel else hidden
        kept = (targets != call.ignore_index).nonzero()[:, 0]
        rows = make_rows(whole, weight, bias, shard, call.scale, targets, kept)
        backend = load_backend(options.backend, hidden.device, hidden.dtype)
        skips = call.needs_grad and options.skip_mass > 0
        blocks = call.blocks or Blocks.default(rows.hidden.shape[0], hidden.device, skips)
        table, record = backend.statistics(rows, blocks, call.top1, call.sum_squares, want_mass=skips,
                                           cache_bytes=options.cache_bytes if call.needs_grad else 0)
        if call.top1:
            table[TOP_ID] += shard.start
        tables = gather_tables(_spread(table, kept, targets.numel()), shard, targets)
        tables = tables if kept.numel() == targets.numel() else tables.index_select(2, kept)
        merged = merge(tables, call.top1, call.sum_squares)
        check_finite(merged, whole, weight, bias, kept)
        skip_below, dropped = None, None
        if skips:
            skip_below = merged.reference + merged.total.log2() + math.log2(options.skip_mass)
            dropped = _dropped_mass(record, rows, blocks, merged, skip_below)
        if call.needs_grad:
            ctx.save_for_backward(hidden, weight, bias, kept, targets, merged.reference, merged.total, merged.entropy,
                                  skip_below, *record.tensors())
            ctx.call, ctx.blocks, ctx.backend = call, blocks, backend
        # a copy, since the backward reads the entropy and a caller may change his in place
        results = (merged.logprobs, merged.entropy.clone(), merged.top_ids, merged.top_logprobs, merged.sum_squares,
                   dropped)
        results = tuple(_spread(r, kept, targets.numel()) for r in results)
        ctx.mark_non_differentiable(*(r for r in results[2:] if r is not None))
        return results

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        hidden, weight, bias, kept, targets, reference, total, entropy, skip_below, *recorded = ctx.saved_tensors
        call, shard, record = ctx.call, ctx.call.shard, BlockRecord.of_tensors(recorded)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream = [None if g is None else g[kept].to(entropy.dtype) for g in (grad_logprobs, grad_entropy)]
        matters = sum((u != 0 for u in upstream if u is not None), torch.zeros_like(kept, dtype=torch.bool))
        whole = gather_hidden(hidden, shard) if call.sequence_parallel else hidden
        active = None if bool(matters.all()) else matters.nonzero()[:, 0]
        if active is not None:
            kept, reference, total, entropy = kept[active], reference[active], total[active], entropy[active]
            upstream = [None if g is None else g[active] for g in upstream]
            skip_below = None if skip_below is None else skip_below[active]
        rows = make_rows(whole, weight, bias, shard, call.scale, targets, kept)
        a = torch.zeros_like(entropy) if upstream[0] is None else upstream[0]
        gradient = LogitGradient.of_scores(a, upstream[1], reference, total, entropy, rows.scale)
        grads = HeadGradients(targets.numel(), kept, whole if wants_hidden else None,
                              weight if wants_weight else None, bias if wants_bias else None, shard.num_valid,
                              entropy.dtype)
        reduction = HiddenReduction(shard.group, shard.world_size, call.sequence_parallel)
        scores = ScoreGradient(ctx.backend, rows, gradient, record, ctx.blocks, active, skip_below)
        sweep(rows, ctx.blocks, grads, reduction, scores.fill)
        grad_hidden = reduction.wait()
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grads.weight, grads.bias, None, None


def _spread(values: torch.Tensor | None, kept: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """Results [..., k] of the rows that were scored among all N; 0 where a row was ignored."""
    if values is None or kept.numel() == num_rows:
        return values
    return values.new_zeros(*values.shape[:-1], num_rows).index_copy_(-1, kept, values)


def _dropped_mass(record: BlockRecord, rows: HeadRows, blocks: Blocks, merged: Merged,
                  skip_below: torch.Tensor) -> torch.Tensor:
    """[n] probability of the blocks of this rank's shard that the backward will leave out."""
    if rows.weight.shape[0] == 0:
        return torch.zeros_like(merged.entropy)
    number = torch.arange(record.log_mass.shape[0], device=rows.hidden.device)[:, None]
    left_out = (record.log_mass < skip_below) & (rows.columns // blocks.columns != number)
    mass = (record.log_mass - merged.reference).exp2() / merged.total
    return torch.where(left_out, mass, 0).sum(0)
