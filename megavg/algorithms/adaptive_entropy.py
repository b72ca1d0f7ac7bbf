"""Adaptive entropy bonus [reported] (Skywork-OR1, arXiv 2505.22312): a bonus only while entropy is at its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class AdaptiveEntropy(Algorithm):
    """An entropy bonus that grows while entropy is below a target and is off above it. [reported]

    Each step c moves by +delta where H < target_entropy and by -delta elsewhere, inside [0, bonus_max]; the coefficient
    is c where H <= target_entropy and 0 elsewhere, added to what the methods behind give. H is the mean entropy of the
    behaviour policy over the valid tokens of the optimiser batch.
    """

    mark = "[reported]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of the adaptive bonus beside GRPO's.

        Attributes:
            target_entropy: what entropy is held at from below, nats.
            delta: how far c moves in a step.
            bonus_max: largest c; the paper names no bound, this one is [ours].
        """

        target_entropy: float = 0.2
        delta: float = 5e-3
        bonus_max: float = 0.1

        def __post_init__(self):
            super().__post_init__()
            if min(self.target_entropy, self.delta, self.bonus_max) < 0:
                raise ValueError(f"target_entropy={self.target_entropy}, delta={self.delta} and bonus_max="
                                 f"{self.bonus_max} must not be negative")

    def __init__(self, config: Config):
        super().__init__(config)
        self.bonus = 0.0

    def entropy_coefficient(self, batch: RolloutBatch, stats: TokenScores, progress: float) -> float | torch.Tensor:
        """Move c by one step and give the coefficient; to be called once a step."""
        config = self.config
        entropy = float(batch.mean(stats.entropy.detach()))
        moved = self.bonus + (config.delta if entropy < config.target_entropy else -config.delta)
        self.bonus = min(max(moved, 0.0), config.bonus_max)
        coefficient = self.bonus if entropy <= config.target_entropy else 0.0
        self.metrics["adaptive_entropy/coefficient"] = coefficient
        return super().entropy_coefficient(batch, stats, progress) + coefficient

    def state_dict(self) -> dict:
        return super().state_dict() | {"bonus": self.bonus}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.bonus = state["bonus"]


ALGORITHM = AdaptiveEntropy
