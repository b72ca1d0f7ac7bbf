"""Clip-Cov [exact] (arXiv 2505.22617): drop a few tokens whose covariance would lower entropy the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class ClipCov(Algorithm):
    """Drop the loss of a random max(1, int(clip_cov_share * N)) tokens of high covariance. [exact]

    An entropy bonus stays on them. The covariance of a token is (A - mean A)(log pi_old - mean log pi_old), means and N
    over the valid tokens of the whole optimiser batch; candidates have one between clip_cov_low and clip_cov_high. The
    authors' code takes log pi of the policy being trained, micro-batch by micro-batch, and leaves out tokens that the
    ratio's clip stops; at the first update of a batch log pi is log pi_old and no token is stopped. Which candidates
    are drawn depends on the answers' own chance, never on the layout.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of Clip-Cov beside GRPO's.

        Attributes:
            clip_cov_share: tokens that are dropped, as a share of all; one at the least.
            clip_cov_low, clip_cov_high: covariances of the candidates, bounds excluded.
        """

        clip_cov_share: float = 2e-4
        clip_cov_low: float = 1.0
        clip_cov_high: float = 5.0

        def __post_init__(self):
            super().__post_init__()
            if not 0 < self.clip_cov_share <= 1:
                raise ValueError(f"clip_cov_share={self.clip_cov_share} must be in (0, 1]")
            if not self.clip_cov_low < self.clip_cov_high:
                raise ValueError(f"clip_cov_low={self.clip_cov_low} must be below clip_cov_high={self.clip_cov_high}")

    def weights(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor,
                progress: float) -> torch.Tensor:
        """Weights of the methods behind, 0 on the tokens drawn [B, T]."""
        import torch

        from megavg.ops.chance import uniforms
        from megavg.ops.selection import covariances, largest, num_valid

        config, mask = self.config, batch.mask
        covariance = covariances(advantages, stats.logprobs.detach(), mask, batch.all_sum)
        candidates = mask & (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
        count = max(1, int(config.clip_cov_share * num_valid(mask, batch.all_sum)))
        lots = torch.stack([uniforms(f"{stream}/clip_cov", mask.shape[1]) for stream in batch.streams]).to(mask.device)
        dropped = largest(-lots, candidates, count, batch.all_gather)
        self.metrics["clip_cov/dropped_tokens"] = float(num_valid(dropped, batch.all_sum))
        return super().weights(batch, stats, advantages, progress) * ~dropped


ALGORITHM = ClipCov
