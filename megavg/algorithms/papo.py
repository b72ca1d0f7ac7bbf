"""PAPO [reported] (perception-aware policy optimisation, arXiv 2507.06448): answers should need the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm, k3
from megavg.protocols.options import Perturbation

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores


class PAPO(Algorithm):
    """GRPO that also maximises papo_gamma * KL(k3) between the policy on the image and on a masked one. [reported]

    The log-probs on the masked image are the behaviour policy's and are held fixed for the whole optimiser batch; in
    this the definition is [ours]: the paper scores the masked image anew with the policy being trained.
    """

    mark = "[reported]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of PAPO beside GRPO's.

        Attributes:
            papo_gamma: weight of the KL to the masked image; 0.01 to 0.02 in the paper, more runs away.
            perturbation: how the image is masked.
        """

        papo_gamma: float = 0.01
        perturbation: Perturbation = field(default_factory=lambda: Perturbation(kind="patch_mask", mask_share=0.6))

        def __post_init__(self):
            super().__post_init__()
            if self.papo_gamma < 0:
                raise ValueError(f"papo_gamma={self.papo_gamma} must not be negative")

    @property
    def perturbation(self) -> Perturbation:
        return self.config.perturbation

    def extra(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Beside the others', ``papo`` [B, T]: log-probs on the masked image, nats."""
        return super().extra(batch, stats, advantages) | {"papo": stats.perturbed.logprobs}

    def token_loss(self, new: TokenScores, signal: PolicySignal) -> torch.Tensor:
        """The loss less papo_gamma times the KL to the masked image [B, T]."""
        return super().token_loss(new, signal) - self.config.papo_gamma * k3(new.logprobs, signal.extra["papo"])


ALGORITHM = PAPO
