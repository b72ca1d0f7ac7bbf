"""Log-prob and entropy of tokens under a head whose vocabulary rows are split over ranks, without storing logits.

With z = h W^T / T, p = softmax(z): l = log p_y and H = -sum p log p. Rows are worked through in chunks; a chunk's
logits live only while its statistics are taken. Each rank reduces its rows of the vocabulary to four numbers a token,

    m = max z,   s = sum e^(z-m),   u = sum e^(z-m) (z-m),   z_y if y is here else 0,

one all-gather of [4, N] brings them together, and every rank merges them in rank order (so all get the same bits):

    l = (z_y - m) - log s,      H = log s - u / s.

Backward recomputes the logits. With upstream a = dL/dl and b = dL/dH:

    dL/dz_j = (1/T) { a [j = y] - p_j ( a + b H + b log p_j ) },

the head's gradient stays local and the hidden states' gradient takes one all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavg.protocols.batch import TokenScores

_CHUNK_BYTES = 64 * 2**20
_MIN_CHUNK_ROWS = 128  # fewer rows make the matrix products bound by memory


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the head this rank holds.

    Attributes:
        start, stop: the half-open range of token ids.
        vocab_size: true size V; rows with an id >= V pad the shards to equal length and have no probability.
        group: the tensor-parallel group, or None for an unsplit head.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def num_valid(self) -> int:
        """How many of this rank's rows are real tokens."""
        return max(0, min(self.stop, self.vocab_size) - self.start)


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
) -> TokenScores:
    """Score each target token: log-prob and entropy under softmax(hidden weight^T / temperature).

    Args:
        hidden: [N, D], the same on all ranks of ``shard.group``.
        weight: [Vs, D], this rank's rows of the head.
        targets: [N] int64, token ids in 0..V-1, the same on all ranks.
        temperature: > 0.

    Returns:
        ``TokenScores`` of [N] fp32 (fp64 for fp64 input), equal on all ranks, differentiable to hidden and weight.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a temperature <= 0.
    """
    _check(hidden, weight, targets, shard, temperature)
    logprobs, entropy = _TokenScores.apply(hidden, weight, targets, shard, temperature)
    return TokenScores(logprobs, entropy)


def _check(hidden, weight, targets, shard: VocabShard, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [N, D] and weight [Vs, D] of one width, got {tuple(hidden.shape)} and "
                         f"{tuple(weight.shape)}")
    if weight.shape[0] != shard.stop - shard.start:
        raise ValueError(f"the head has {weight.shape[0]} rows but the shard says {shard.start}..{shard.stop}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected {hidden.shape[0]} targets, got shape {tuple(targets.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= shard.vocab_size):
        raise ValueError(f"targets must lie in 0..{shard.vocab_size - 1}, got {int(targets.min())}.."
                         f"{int(targets.max())}")


def _chunks(num_rows: int, num_columns: int):
    rows = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // max(1, 4 * num_columns))
    return [slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows)]


def project(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """hidden [N, D] times weight^T [D, Vs] in ``dtype``; logits of bf16 operands are never rounded to bf16."""
    if hidden.dtype == dtype:
        return torch.mm(hidden, weight.t())
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    return torch.mm(hidden.to(dtype), weight.t().to(dtype))


def _logits(hidden, weight, inverse_temperature: float, dtype) -> torch.Tensor:
    return project(hidden, weight, dtype).mul_(inverse_temperature)


def _shard_statistics(hidden, weight, local_targets, inverse_temperature, dtype) -> torch.Tensor:
    """[4, N] = (m, s, u, z_y) of this rank's rows; an empty shard gives (-inf, 0, 0, 0)."""
    stats = torch.zeros(4, hidden.shape[0], dtype=dtype, device=hidden.device)
    stats[0] = -torch.inf
    if weight.shape[0] == 0:
        return stats
    here = (local_targets >= 0) & (local_targets < weight.shape[0])
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        z = _logits(hidden[rows], weight, inverse_temperature, dtype)
        index = local_targets[rows].clamp(0, weight.shape[0] - 1)[:, None]
        stats[3, rows] = torch.where(here[rows], z.gather(1, index)[:, 0], 0)
        stats[0, rows] = z.amax(1)
        z -= stats[0, rows, None]
        e = z.exp()
        stats[1, rows] = e.sum(1)
        stats[2, rows] = torch.linalg.vecdot(e, z)
    return stats


def _merge(stats: torch.Tensor, group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of all shards -> (log-prob, entropy, log of the normaliser), each [N]."""
    world = 1 if group is None else dist.get_world_size(group)
    parts = stats[None]
    if world > 1:
        flat = stats.new_empty(world * 4, stats.shape[1])
        dist.all_gather_into_tensor(flat, stats, group=group)
        parts = flat.view(world, 4, -1)
    m = parts[:, 0].amax(0)
    shift = (parts[:, 0] - m).clamp_min(-1e4)  # an empty shard: -inf would make 0 * inf below
    scale = shift.exp()
    s = (scale * parts[:, 1]).sum(0)
    u = (scale * (parts[:, 2] + shift * parts[:, 1])).sum(0)
    log_s = s.log()
    return (parts[:, 3].sum(0) - m) - log_s, log_s - u / s, m + log_s


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, shard: VocabShard, temperature: float):
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        local_targets = targets - shard.start
        stats = _shard_statistics(hidden, weight[:shard.num_valid], local_targets, 1 / temperature, dtype)
        logprobs, entropy, log_normaliser = _merge(stats, shard.group)
        ctx.save_for_backward(hidden, weight, local_targets, entropy, log_normaliser)
        ctx.shard, ctx.inverse_temperature = shard, 1 / temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, local_targets, entropy, log_normaliser = ctx.saved_tensors
        shard, inverse_temperature = ctx.shard, ctx.inverse_temperature
        valid = weight[:shard.num_valid]
        grad_hidden = torch.zeros_like(hidden, dtype=entropy.dtype)
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype)
        a, b = grad_logprobs * inverse_temperature, grad_entropy * inverse_temperature
        for rows in _chunks(hidden.shape[0], max(1, shard.num_valid)) if shard.num_valid else []:
            logp = _logits(hidden[rows], valid, inverse_temperature, entropy.dtype).sub_(log_normaliser[rows, None])
            p = logp.exp()
            dz = torch.addcmul((a + b * entropy)[rows, None], logp, b[rows, None]).mul_(p).neg_()
            here = (local_targets[rows] >= 0) & (local_targets[rows] < shard.num_valid)
            hit = here.nonzero()[:, 0]
            dz[hit, local_targets[rows][hit]] += a[rows][hit]
            dz = dz.to(hidden.dtype)
            grad_hidden[rows] = torch.mm(dz, valid).to(entropy.dtype)
            grad_weight[:shard.num_valid] += torch.mm(dz.t(), hidden[rows])
        if shard.group is not None and dist.get_world_size(shard.group) > 1:
            dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None
