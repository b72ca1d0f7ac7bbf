"""Learn only from the most uncertain tokens [exact] (the 80/20 rule, arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class TopEntropy(Algorithm):
    """Drop the loss of all but the ceil(share * N) tokens of the highest entropy. [exact]

    N are the valid tokens of the whole optimiser batch, and the mean is still taken over all of them. Tokens that tie
    with the last one are kept. The paper builds it on DAPO: ``top_entropy+dapo``.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of the selection beside GRPO's.

        Attributes:
            share: of the tokens that are kept.
            take: ``top`` keeps the highest entropies, ``bottom`` the lowest (a control).
        """

        share: float = 0.2
        take: Literal["top", "bottom"] = "top"

        def __post_init__(self):
            super().__post_init__()
            if not 0 < self.share <= 1:
                raise ValueError(f"share={self.share} must be in (0, 1]")

    def weights(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor,
                progress: float) -> torch.Tensor:
        """Weights of the methods behind, 0 on tokens that are not kept [B, T]."""
        from megavg.ops.selection import largest, share_of

        total = batch.all_sum(batch.mask.sum())
        count = int(share_of(self.config.share, total))
        entropy = stats.entropy.detach()
        kept = largest(entropy if self.config.take == "top" else -entropy, batch.mask, count, batch.all_gather)
        self.metrics["top_entropy/kept_share"] = float(batch.all_sum(kept.sum()) / total.clamp_min(1))
        return super().weights(batch, stats, advantages, progress) * kept


ALGORITHM = TopEntropy
