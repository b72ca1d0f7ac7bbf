"""Losses and their gradients read literally from the formulas, in plain loops over Python's double precision."""

from __future__ import annotations

import math
import statistics
from typing import Callable

import torch

from megavg.algorithms.base import Algorithm
from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores
from megavg.trainer.step import make_signal, micro_batch_loss
from tests.rollout_batches import on_ranks

Token = tuple[int, int]


def moved(stats: TokenScores, mask: torch.Tensor, scale: float, seed: int = 0) -> TokenScores:
    """The policy some updates later: other log-probs and entropies, zeros on padding."""
    generator = torch.Generator().manual_seed(seed)
    steps = [scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return TokenScores((stats.logprobs + steps[0]) * mask, (stats.entropy + steps[1]).abs() * mask)


def group_advantages(rewards: list[float], group_size: int, normalize_std: bool = True) -> list[float]:
    """Reward minus the group's mean, over the unbiased deviation plus 1e-4."""
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start:start + group_size]
        scale = statistics.stdev(group) + 1e-4 if normalize_std else 1.0
        out += [(reward - statistics.fmean(group)) / scale for reward in group]
    return out


class Plain:
    """A batch as lists of numbers; ``new`` is what derivatives are taken to, ``held`` what a stop-gradient sees."""

    def __init__(self, batch: RolloutBatch, stats: TokenScores, new: TokenScores):
        self.lengths = batch.mask.sum(1).tolist()
        self.tokens = [(b, t) for b, length in enumerate(self.lengths) for t in range(length)]
        self.rewards, self.group_size = batch.rewards.tolist(), batch.group_size
        self.limit, self.streams = batch.max_new_tokens, batch.streams
        self.old, self.old_entropy = stats.logprobs.tolist(), stats.entropy.tolist()
        self.new, self.held, self.entropy = new.logprobs.tolist(), new.logprobs.tolist(), new.entropy.tolist()
        self.advantages = group_advantages(self.rewards, self.group_size)

    def ratio(self, b: int, t: int) -> float:
        return math.exp(self.new[b][t] - self.old[b][t])

    def clipped(self, b: int, t: int, low: float = 0.2, high: float = 0.2) -> float:
        """The objective of GRPO."""
        ratio, advantage = self.ratio(b, t), self.advantages[b]
        return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)

    def share(self, b: int, aggregation: str) -> float:
        """What the loss of each token of answer b is multiplied by."""
        return {"response_mean": 1 / (len(self.lengths) * self.lengths[b]), "token_mean": 1 / len(self.tokens),
                "constant": 1 / (len(self.lengths) * self.limit)}[aggregation]

    def loss(self, objective: Callable[[int, int], float], aggregation: str = "response_mean") -> float:
        return -math.fsum(self.share(b, aggregation) * objective(b, t) for b, t in self.tokens)

    def slopes(self, loss: Callable[[], float], values: list[list[float]], step: float = 1e-6) -> list[list[float]]:
        """The derivative of ``loss`` to each of ``values``, by differences."""
        found = [[0.0] * len(row) for row in values]
        for b, t in self.tokens:
            kept = values[b][t]
            values[b][t] = kept + step
            above = loss()
            values[b][t] = kept - step
            found[b][t] = (above - loss()) / (2 * step)
            values[b][t] = kept
        return found


def loss_and_slopes(algorithm: Algorithm, batch: RolloutBatch, stats: TokenScores, new: TokenScores,
                    size: int) -> tuple[float, torch.Tensor, torch.Tensor, PolicySignal]:
    """(loss, d/d log-probs, d/d entropy, signal) of these rows in micro-batches of ``size``, as the trainer does it."""
    signal = make_signal(algorithm, batch, stats, None, 0.5)
    logprobs, entropy = (values.clone().requires_grad_() for values in (new.logprobs, new.entropy))
    rows = [range(b, min(b + size, len(batch.rewards))) for b in range(0, len(batch.rewards), size)]
    loss = micro_batch_loss(algorithm, signal, rows)
    total = 0.0
    for i, part in enumerate(rows):
        where = slice(part.start, part.stop)
        keep = batch.mask[where]
        value = loss(i, logprobs[where][keep], entropy[where][keep])
        value.backward()
        total += float(value.detach())
    assert logprobs.grad[~batch.mask].eq(0).all()
    entropy_slopes = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return total, logprobs.grad, entropy_slopes, signal


def assert_equals_loops(make: Callable[[], Algorithm], batch: RolloutBatch, stats: TokenScores, new: TokenScores,
                        slow: Callable[[Plain], float]) -> tuple[Algorithm, PolicySignal, torch.Tensor]:
    """Loss and gradients are those of ``slow``, in whatever micro-batches and on however many ranks.

    Gives the algorithm after the batch, its signal and the gradient to the log-probs.
    """
    plain = Plain(batch, stats, new)
    algorithm, rows = make(), len(batch.rewards)
    loss, slopes, entropy_slopes, signal = loss_and_slopes(algorithm, batch, stats, new, rows)
    assert abs(loss - slow(plain)) <= 2e-7 + 1e-6 * abs(loss)
    for found, values in ((slopes, plain.new), (entropy_slopes, plain.entropy)):
        expected = torch.tensor(plain.slopes(lambda: slow(plain), values), dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8), float((found - expected).abs().max())
    for size in (1, 3):
        other, *others, _ = loss_and_slopes(make(), batch, stats, new, size)
        assert abs(other - loss) < 1e-12 and torch.allclose(others[0], slopes, rtol=1e-12, atol=1e-15)
        assert torch.allclose(others[1], entropy_slopes, rtol=1e-12, atol=1e-15)

    def on_rank(part: RolloutBatch, part_stats: TokenScores, start: int, stop: int):
        own, part_new = make(), TokenScores(new.logprobs[start:stop], new.entropy[start:stop])
        return *loss_and_slopes(own, part, part_stats, part_new, 3), own

    group = batch.group_size
    cuts = [group, rows - group] if rows > 2 * group else [group] if rows > group else []
    ranks = on_ranks(batch, stats, cuts, on_rank)
    assert abs(sum(r[0] for r in ranks) - loss) <= 1e-7 * (1 + abs(loss))
    assert torch.allclose(torch.cat([r[1] for r in ranks]), slopes, rtol=1e-6, atol=1e-10)
    assert torch.allclose(torch.cat([r[2] for r in ranks]), entropy_slopes, rtol=1e-6, atol=1e-10)
    for *_, own in ranks:
        assert own.metrics.keys() == algorithm.metrics.keys()
        assert own.state_dict().keys() == algorithm.state_dict().keys()
        for name, value in algorithm.metrics.items():
            assert abs(own.metrics[name] - value) < 1e-6, name
    return algorithm, signal, slopes
