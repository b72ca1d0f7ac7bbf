"""Supervised fine-tuning [exact]: cross-entropy on written answers, the baseline that every paper compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores


class SFT(Algorithm):
    """Maximise the log-prob of the true answer, written in the family's own frame and format. [exact]"""

    uses_rollouts = False

    @dataclass(frozen=True)
    class Config:
        """Options of supervised fine-tuning.

        Attributes:
            entropy_coefficient: weight of the mean entropy, which is maximised when positive.
            aggregation: ``token_mean`` over all tokens of the optimiser batch, or ``response_mean``.
        """

        entropy_coefficient: float = 0.0
        aggregation: Literal["response_mean", "token_mean"] = "token_mean"

    def advantages(self, batch: RolloutBatch, stats: TokenScores | None) -> torch.Tensor:
        """Every token of a written answer counts alike."""
        return batch.mask.float()

    def token_loss(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """-log pi(token)."""
        return -new.logprobs


ALGORITHM = SFT
