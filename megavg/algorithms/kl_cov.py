"""KL-Cov [exact] (arXiv 2505.22617): hold the few tokens of the highest covariance near the behaviour policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores


class KLCov(Algorithm):
    """rho A without a clip, minus kl_cov_coefficient * abs(log pi - log pi_old) on tokens of high covariance. [exact]

    Those are the max(1, int(kl_cov_share * N)) tokens with the largest (A - mean A)(log pi_old - mean log pi_old), ties
    included, but only positive ones, means and N over the valid tokens of the whole optimiser batch. The authors' code
    takes log pi of the policy being trained, micro-batch by micro-batch, which is log pi_old at the first update of a
    batch. There the penalty is abs(0), whose gradient is 0: it acts only where trainer.updates_per_batch is above 1.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of KL-Cov beside GRPO's, of which clip_low and clip_high are not used.

        Attributes:
            kl_cov_share: tokens that are held, as a share of all; one at the least.
            kl_cov_coefficient: weight of the penalty.
        """

        kl_cov_share: float = 2e-3
        kl_cov_coefficient: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            if not 0 < self.kl_cov_share <= 1:
                raise ValueError(f"kl_cov_share={self.kl_cov_share} must be in (0, 1]")
            if self.kl_cov_coefficient < 0:
                raise ValueError(f"kl_cov_coefficient={self.kl_cov_coefficient} must not be negative")

    def extra(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Beside the others', ``kl_cov`` [B, T] bool: the tokens to hold."""
        from megavg.ops.selection import covariances, largest, num_valid

        covariance = covariances(advantages, stats.logprobs.detach(), batch.mask, batch.all_sum)
        count = max(1, int(self.config.kl_cov_share * num_valid(batch.mask, batch.all_sum)))
        held = largest(covariance, batch.mask & (covariance > 0), count, batch.all_gather)
        return super().extra(batch, stats, advantages) | {"kl_cov": held}

    def surrogate(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """rho A of every token [B, T]."""
        return (new.logprobs - signal.old_logprobs).exp() * signal.advantages

    def token_loss(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """The loss with the penalty of the tokens held [B, T]."""
        moved = (new.logprobs - signal.old_logprobs).abs()
        return super().token_loss(new, signal) + self.config.kl_cov_coefficient * moved * signal.extra["kl_cov"]


ALGORITHM = KLCov
