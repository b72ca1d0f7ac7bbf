"""What the ranks of a vocabulary-parallel head tell each other: shards, their statistics, and the merge.

A set B of columns of a row of logits is summed up by four numbers, all in bits (base 2, x = z log2 e),

    m = a reference near max x,   s = sum 2^(x-m),   u = sum 2^(x-m) (x-m),   x_y if the target is in B else 0,

of which those of two sets merge into those of their union. Being relative to m, nothing cancels however large the
logits are. One all-gather brings the ranks' numbers together and every rank merges them in rank order, so that all get
the same bits, whatever the shards' sizes. One more column of the same all-gather carries the shards themselves: a
group whose shards overlap or leave a gap is refused at no further collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

REFERENCE, SUM, MOMENT, TARGET, TOP_ID = range(5)
"""Rows of a table of statistics; TOP_ID, and sum 2^(2 (x-m)) as the last row, are there where they were asked for."""

_FINGERPRINT = 2**20  # integers below 2^24 survive fp32


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the head this rank holds.

    Attributes:
        start, stop: the half-open range of token ids; empty is allowed.
        vocab_size: true size V; rows with an id >= V pad the shards and have no probability and no gradient.
        group: the tensor-parallel group, or None for an unsplit head.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, vocab_size: int) -> "VocabShard":
        """The head of one process."""
        return cls(0, vocab_size, vocab_size)

    @property
    def num_valid(self) -> int:
        """How many of this rank's rows are real tokens."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    @property
    def world_size(self) -> int:
        """Ranks that share the head."""
        return 1 if self.group is None else dist.get_world_size(self.group)


@dataclass(frozen=True)
class Merged:
    """A row's softmax over the whole vocabulary; each [N], equal on all ranks.

    Attributes:
        reference, total: m and s; log2 of the normaliser is m + log2 s, kept apart since their sum would round.
        logprobs, entropy: nats.
        top_ids, top_logprobs: the most likely token, the lowest id among equals; None unless asked for.
        sum_squares: sum of p^2; None unless asked for.
    """

    reference: torch.Tensor
    total: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    sum_squares: torch.Tensor | None = None


def gather_tables(table: torch.Tensor, shard: VocabShard, targets: torch.Tensor | None = None) -> torch.Tensor:
    """[R, N] of each rank -> [world, R, N], by one all-gather.

    Raises:
        ValueError: the group's shards do not make up the vocabulary, or its ranks score different ``targets`` [N].
    """
    if shard.world_size == 1:
        _check_cover([(shard.start, shard.stop)], shard.vocab_size)
        return table[None]
    about = [shard.start, shard.stop, shard.vocab_size, 0 if targets is None else _fingerprint(targets)]
    column = table.new_tensor(about + [0] * (table.shape[0] - 4))[:, None]
    sent = torch.cat([table, column], 1)
    received = sent.new_empty(shard.world_size * sent.shape[0], sent.shape[1])
    dist.all_gather_into_tensor(received, sent, group=shard.group)
    tables = received.view(shard.world_size, *sent.shape)
    _check_ranks([[int(x) for x in row] for row in tables[:, :4, -1].tolist()])
    return tables[:, :, :-1]


def _fingerprint(targets: torch.Tensor) -> int:
    order = torch.arange(1, targets.numel() + 1, device=targets.device)
    return int((targets * order).sum()) % _FINGERPRINT


def _check_ranks(about: list[list[int]]) -> None:
    sizes = {row[2] for row in about}
    if len(sizes) > 1:
        raise ValueError(f"the ranks of the group disagree on the vocabulary's size: {sorted(sizes)}")
    _check_cover([(row[0], row[1]) for row in about], about[0][2])
    if len({row[3] for row in about}) > 1:
        raise ValueError("the ranks of the group were given different targets; all must score the same tokens in the "
                         "same order")


def _check_cover(ranges: list[tuple[int, int]], vocab_size: int) -> None:
    reached = 0
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if start != reached:
            what = "leave a gap" if start > reached else "overlap"
            raise ValueError(f"the shards {what}: expected one to start at {reached}, got {start}..{stop}; the shards "
                             f"of the group are {', '.join(f'{a}..{b}' for a, b in ranges)}")
        reached = stop
    if reached < vocab_size:
        raise ValueError(f"the shards end at {reached} but the vocabulary has {vocab_size} tokens; the shards of the "
                         f"group are {', '.join(f'{a}..{b}' for a, b in ranges)}")


def merge(tables: torch.Tensor, top1: bool = False, sum_squares: bool = False) -> Merged:
    """[K, R, N] of K disjoint sets that make up the vocabulary -> the whole softmax of each row.

    log2 p_y = (x_y - m) - log2 s and H = log2 s - u/s bits: the size of the logits enters nowhere.
    """
    dtype = tables.dtype
    table = merge_tables(tables.double(), top1, sum_squares)
    log_s = table[SUM].log2()
    nats = math.log(2)
    extra = {}
    if top1:
        extra.update(top_ids=table[TOP_ID].long(), top_logprobs=(-log_s * nats).to(dtype))
    if sum_squares:
        extra.update(sum_squares=(table[-1] / table[SUM]**2).to(dtype))
    return Merged(table[REFERENCE].to(dtype), table[SUM].to(dtype),
                  ((table[TARGET] - table[REFERENCE] - log_s) * nats).to(dtype),
                  ((log_s - table[MOMENT] / table[SUM]) * nats).to(dtype), **extra)


def merge_tables(tables: torch.Tensor, top1: bool = False, sum_squares: bool = False) -> torch.Tensor:
    """[K, R, N] of K disjoint sets -> [R, N] of their union; the lowest id is the top token among equals."""
    merged = torch.empty_like(tables[0])
    reference = tables[:, REFERENCE].amax(0)
    shift = (tables[:, REFERENCE] - reference).clamp_min(-1e4)  # an empty set: -inf would make 0 * inf below
    scale = shift.exp2()
    merged[REFERENCE] = reference
    merged[SUM] = (scale * tables[:, SUM]).sum(0)
    merged[MOMENT] = (scale * (tables[:, MOMENT] + shift * tables[:, SUM])).sum(0)
    merged[TARGET] = tables[:, TARGET].sum(0)
    if top1:
        best = tables[:, REFERENCE] == reference
        merged[TOP_ID] = torch.where(best, tables[:, TOP_ID], torch.inf).amin(0)
    if sum_squares:
        merged[-1] = (scale**2 * tables[:, -1]).sum(0)
    return merged
