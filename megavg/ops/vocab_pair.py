"""How far apart two distributions under one vocabulary-parallel head are: Jensen-Shannon divergence, KL, entropy gap.

With p = softmax(h W^T / T), q = softmax(h' W^T / T), m = (p + q) / 2 and H the entropy,

    K_P = sum p log(p/m),   K_Q = sum q log(q/m),   JSD = (K_P + K_Q) / 2,   KL = sum p log(p/q),   gap = H(p) - H(q),

    dJSD/dz_j = p_j / 2T (log(p_j/m_j) - K_P),           dgap/dz_j = -p_j / T (log p_j + H(p)),

and likewise for q. log(p/m) mixes both normalisers, so there is no one-pass form: a first sweep takes the statistics
of both (one all-gather), a second one K_P, K_Q and KL (one all-reduce of [3, N]), the backward makes the logits anew
(one reduction). With d = log p - log q the larger of log(p/m), log(q/m) is -log1p(expm1(-|d|) / 2) and the smaller is
that less |d|; KL is summed as p d + q - p = p (d + expm1(-d)), never negative and of second order in d. So nothing
cancels where p is near q, nor where one of them vanishes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megavg.ops.vocab_gradient import HeadGradients, HiddenReduction, sweep
from megavg.ops.vocab_inputs import (check_finite, check_head, check_targets, make_rows, make_scale,
                                     without_autocast)
from megavg.ops.vocab_rows import NATS, Blocks, HeadRows, column_blocks
from megavg.ops.vocab_shard import VocabShard, gather_tables, merge
from megavg.ops.vocab_torch import scaled_logits, statistics
from megavg.protocols.batch import IGNORE, PairScores


def pair_divergence(
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight: torch.Tensor,
    shard: VocabShard,
    temperature: float | torch.Tensor = 1.0,
    *,
    targets: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> PairScores:
    """Compare row by row two distributions P and Q over the vocabulary, without storing logits.

    It runs on any device, by the torch backend; rows without an upstream gradient cost nothing in the backward.

    Args:
        hidden_p, hidden_q: [N, D] each, the same on all ranks of ``shard.group``. Detach one to hold it fixed.
        weight: [Vs, D], this rank's rows of the head, which both share.
        shard: which rows these are.
        temperature: > 0, a number or [N].
        targets: [N] int64, ids whose log-probs under P and Q are wanted too, which costs no further pass. Ids of -100
            get 0; the divergence counts their rows all the same.
        bias: [Vs].
        blocks: size of the tiles; None takes what was the fastest.

    Returns:
        ``PairScores`` of [N] fp32 (fp64 for fp64 input), equal on all ranks; the Jensen-Shannon divergence and the gap
        are differentiable to both hidden states, weight and bias.

    Raises:
        ValueError: as ``token_scores``; hidden states of two shapes.
    """
    if hidden_p.shape != hidden_q.shape or hidden_p.dtype != hidden_q.dtype:
        raise ValueError(f"expected two sets of hidden states of one shape and dtype, got {tuple(hidden_p.shape)} "
                         f"{hidden_p.dtype} and {tuple(hidden_q.shape)} {hidden_q.dtype}")
    check_head(hidden_p, weight, shard, bias)
    scale = make_scale(temperature, hidden_p.shape[0], hidden_p)
    if isinstance(scale, torch.Tensor):
        scale = scale.repeat(2)
    if targets is not None:
        check_targets(targets, hidden_p.shape[0], shard, IGNORE, sequence_parallel=False)
    return PairScores(*_PairDivergence.apply(hidden_p, hidden_q, weight, bias, targets, shard, scale, blocks))


class _PairDivergence(torch.autograd.Function):
    """Both sets go through as 2N rows: P's, then Q's."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden_p, hidden_q, weight, bias, targets, shard: VocabShard, scale, blocks: Blocks | None):
        n = hidden_p.shape[0]
        whole = torch.cat([hidden_p, hidden_q])
        both_targets = None if targets is None else targets.repeat(2)
        rows = make_rows(whole, weight, bias, shard, scale, both_targets)
        blocks = blocks or Blocks.default(2 * n, whole.device)
        table, _ = statistics(rows, blocks)
        # without a target log p_y is that of a logit 0, and as finite as the rest
        merged = merge(gather_tables(table, shard, both_targets))
        check_finite(merged, whole, weight, bias)
        log_total = merged.total.double().log2().to(rows.dtype)
        divergence = _divergences(rows, merged.reference, log_total, blocks)
        if shard.world_size > 1:
            dist.all_reduce(divergence, group=shard.group)
        ctx.save_for_backward(hidden_p, hidden_q, weight, bias, merged.reference, log_total, merged.entropy,
                              divergence[:2].flatten())
        ctx.shard, ctx.scale, ctx.blocks = shard, scale, blocks
        entropy = merged.entropy
        jsd = divergence[:2].mean(0).clamp(0, math.log(2)).to(rows.dtype)
        results = [jsd, entropy[:n] - entropy[n:], entropy[:n].clone(), entropy[n:].clone(),
                   divergence[2].clamp_min(0).to(rows.dtype)]
        if targets is not None:
            results += [part.clone() for part in merged.logprobs.where(both_targets != IGNORE, 0).view(2, n)]
        ctx.mark_non_differentiable(*results[2:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_jsd, grad_gap, *_):
        hidden_p, hidden_q, weight, bias, reference, log_total, entropy, divergence = ctx.saved_tensors
        n = hidden_p.shape[0]
        wants_p, wants_q, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        active = ((grad_jsd != 0) | (grad_gap != 0)).nonzero()[:, 0]
        both = torch.cat([active, active + n])
        scale = ctx.scale
        inverse_temperature = scale * NATS
        # of each of the 2N rows: dz = p (half (log p/m - K) + slope (log p + H)); the gap falls with H(q)
        half = torch.cat([grad_jsd, grad_jsd]) / 2 * inverse_temperature
        slope = torch.cat([-grad_gap, grad_gap]) * inverse_temperature
        scalars = [t.index_select(0, both).to(reference.dtype)
                   for t in (reference, log_total, half, slope, slope * entropy - half * divergence)]
        scale = scale[both] if isinstance(scale, torch.Tensor) else scale
        rows = make_rows(torch.cat([hidden_p[active], hidden_q[active]]), weight, bias, ctx.shard, scale)
        grads = HeadGradients(2 * n, both, hidden_p if wants_p or wants_q else None, weight if wants_weight else None,
                              bias if wants_bias else None, ctx.shard.num_valid, rows.dtype)
        reduction = HiddenReduction(ctx.shard.group, ctx.shard.world_size, scatter=False)
        sweep(rows, ctx.blocks, grads, reduction, _PairGradient(rows, scalars, ctx.blocks).fill)
        grad = reduction.wait()
        grad_p = grad[:n].to(hidden_p.dtype) if wants_p else None
        grad_q = grad[n:].to(hidden_q.dtype) if wants_q else None
        return grad_p, grad_q, grads.weight, grads.bias, None, None, None, None


def _log_probs(rows: HeadRows, tile: slice, weight, block: slice, reference, log_total) -> torch.Tensor:
    """[k, c] natural log-probs of one tile; the normaliser's two parts go one by one, their sum would round."""
    out = weight.new_empty(tile.stop - tile.start, weight.shape[0], dtype=rows.dtype)
    bias = None if rows.bias is None else rows.bias[block]
    scaled_logits(out, rows.operand(rows.hidden[tile]), weight, bias, rows.scale_of(tile), reference[tile])
    return out.sub_(log_total[tile, None]).mul_(NATS)


def _pair_tiles(num_rows: int, blocks: Blocks) -> list[tuple[slice, slice]]:
    """Tiles of P's rows with those of Q they are compared with; half as high, since there are two of each buffer."""
    n = num_rows // 2
    tiles = column_blocks(n, max(1, blocks.rows // 2))
    return [(tile, slice(tile.start + n, tile.stop + n)) for tile in tiles]


def _log_ratios(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log(p/m) and log(q/m) with m = (p + q) / 2; log_p is used up."""
    d = log_p.sub_(log_q)
    larger = torch.abs(d).neg_().expm1_().div_(2).log1p_().neg_()
    return larger - d.neg().clamp_min_(0), larger.sub_(d.clamp_min_(0))


def _kl_terms(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """p d + q - p with d = log p - log q; where q is much larger than p, expm1(-d) would overflow."""
    return torch.where(d > -1, d.neg().expm1_().add_(d).mul_(p), p * d + q - p)


def _divergences(rows: HeadRows, reference, log_total, blocks: Blocks) -> torch.Tensor:
    """[3, N] fp64: this rank's part of K_P, K_Q and KL(P || Q)."""
    num_rows = rows.hidden.shape[0]
    n = num_rows // 2
    sums = torch.zeros(num_rows + n, dtype=torch.float64, device=rows.hidden.device)
    for block in column_blocks(rows.weight.shape[0], blocks.columns) if num_rows else []:
        weight = rows.operand(rows.weight[block])
        for tiles in _pair_tiles(num_rows, blocks):
            log_p, log_q = (_log_probs(rows, tile, weight, block, reference, log_total) for tile in tiles)
            probs = log_p.exp(), log_q.exp()
            sums[num_rows:][tiles[0]] += _kl_terms(*probs, log_p - log_q).sum(1)
            for tile, prob, ratio in zip(tiles, probs, _log_ratios(log_p, log_q)):
                sums[tile] += prob.mul_(ratio).sum(1)
    return sums.view(3, n)


class _PairGradient:
    """dz of the divergence and the gap, block by block; P's rows, then Q's, so that one product serves both.

    ``scalars``: reference, log2 s, and half, slope and constant of dz = p (half log(p/m) + slope log p + constant).
    """

    def __init__(self, rows: HeadRows, scalars: list[torch.Tensor], blocks: Blocks):
        self.rows, self.scalars, self.blocks = rows, scalars, blocks
        self.hidden = rows.operand(rows.hidden)

    def fill(self, number: int, block: slice, weight: torch.Tensor, room: torch.Tensor):
        """See ``vocab_gradient.sweep``."""
        reference, log_total, half, slope, constant = self.scalars
        num_rows = self.hidden.shape[0]
        dz = room[:num_rows * weight.shape[0]].view(num_rows, -1)
        for tiles in _pair_tiles(num_rows, self.blocks):
            logs = [_log_probs(self.rows, tile, weight, block, reference, log_total) for tile in tiles]
            ratios = _log_ratios(logs[0].clone(), logs[1])
            for tile, log_prob, ratio in zip(tiles, logs, ratios):
                factor = ratio.mul_(half[tile, None]).add_(constant[tile, None]).add_(log_prob * slope[tile, None])
                dz[tile] = factor.mul_(log_prob.exp_())
        return dz, None, self.hidden
