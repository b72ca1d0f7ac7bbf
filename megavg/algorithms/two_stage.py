"""Two-stage entropy [reported; the lambdas are ours] (arXiv 2511.07738): explore first, become certain later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class TwoStage(Algorithm):
    """GRPO that rewards entropy until ``switch`` of the training is over, and punishes it from then on. [reported]

    The objective gains lambda(tau) H, with H the mean over answers of the mean over tokens, lambda = +lambda_max while
    less than ``switch`` of the steps are done and -lambda_min afterwards. It acts on every answer, groups of equal
    rewards included. The schedule is as reported; the sizes of the lambdas and the cap are this project's. In the paper
    entropy rises to about 4 times its start and then falls to a fifth of its peak: compare the logged ratios.
    """

    mark = "[reported]"

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of the schedule beside GRPO's.

        Attributes:
            variant: ``max_to_min`` is the method; ``max`` and ``min`` keep one sign, ``min_to_max`` turns the stages
                round; ``noisy_max_clean_min`` and ``noisy_min_clean_max`` choose the sign by whether the sample's label
                is noise, at any time.
            lambda_max: weight of the entropy where it is raised.
            lambda_min: weight of the entropy where it is lowered.
            switch: share of the training at whose end the stage changes.
            cap: no bonus while entropy is above this multiple of that of the first step; null sets no bound.
        """

        variant: Literal["max_to_min", "max", "min", "min_to_max", "noisy_max_clean_min",
                         "noisy_min_clean_max"] = "max_to_min"
        lambda_max: float = 1e-2
        lambda_min: float = 1e-2
        switch: float = 0.8
        cap: float | None = None

        def __post_init__(self):
            super().__post_init__()
            if min(self.lambda_max, self.lambda_min) < 0:
                raise ValueError(f"lambda_max={self.lambda_max}, lambda_min={self.lambda_min} must not be negative; "
                                 "variant gives the sign")
            if not 0 <= self.switch <= 1:
                raise ValueError(f"switch={self.switch} must be in 0..1")
            if self.cap is not None and self.cap <= 0:
                raise ValueError(f"cap={self.cap} must be above 0; null sets no bound")

    def __init__(self, config: Config):
        super().__init__(config)
        self.first_entropy: float | None = None
        self.peak_entropy = 0.0

    @property
    def entropy_aggregation(self) -> str:
        """Its own mean, over answers of the mean over tokens, whatever the loss is a mean of."""
        return "response_mean"

    def entropy_coefficient(self, batch: RolloutBatch, stats: TokenScores | None,
                            progress: float) -> float | torch.Tensor:
        """The signed lambda of this step, or [B, 1] of each answer, beside what another method adds."""
        entropy = self._entropy(batch, stats)
        if self.first_entropy is None:
            self.first_entropy = entropy
        self.peak_entropy = max(self.peak_entropy, entropy)
        above = self.config.cap is not None and entropy > self.config.cap * self.first_entropy
        bonus = 0.0 if above else self.config.lambda_max
        own = self._coefficient(batch, progress, bonus, -self.config.lambda_min)
        self.metrics |= {"two_stage/coefficient": self._mean(batch, own),
                         "two_stage/entropy_ratio": entropy / max(self.first_entropy, 1e-12),
                         "two_stage/peak_share": entropy / max(self.peak_entropy, 1e-12)}
        return super().entropy_coefficient(batch, stats, progress) + own

    def state_dict(self) -> dict:
        return super().state_dict() | {"two_stage_first_entropy": self.first_entropy,
                                       "two_stage_peak_entropy": self.peak_entropy}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.first_entropy = state["two_stage_first_entropy"]
        self.peak_entropy = state["two_stage_peak_entropy"]

    def _coefficient(self, batch: RolloutBatch, progress: float, raised: float,
                     lowered: float) -> float | torch.Tensor:
        """``raised`` or ``lowered``, as the variant says, for the step or for each answer [B, 1]."""
        variant = self.config.variant
        if variant in ("max", "min"):
            return raised if variant == "max" else lowered
        if variant in ("max_to_min", "min_to_max"):
            return raised if (progress < self.config.switch) == (variant == "max_to_min") else lowered
        if batch.noisy is None:
            raise ValueError(f"algorithm.variant={variant} needs to know which labels are noise, which these samples "
                             "do not say; set data.noise.probability or take max_to_min")
        up = batch.noisy if variant == "noisy_max_clean_min" else ~batch.noisy
        return batch.rewards.new_tensor(lowered).masked_fill(up, raised)[:, None]

    @staticmethod
    def _entropy(batch: RolloutBatch, stats: TokenScores) -> float:
        """H of the behaviour policy: the mean over all answers of the mean over their tokens, nats."""
        import torch

        lengths = batch.mask.sum(1)
        means = (stats.entropy.detach() * batch.mask).double().sum(1) / lengths.clamp_min(1)
        total, count = batch.all_sum(torch.stack([means.sum(), (lengths > 0).double().sum()])).tolist()
        return total / max(count, 1.0)

    @staticmethod
    def _mean(batch: RolloutBatch, coefficient: float | torch.Tensor) -> float:
        """The mean of what each answer of the whole optimiser batch gets."""
        import torch

        if not isinstance(coefficient, torch.Tensor):
            return float(coefficient)
        values = coefficient.double()
        total, count = batch.all_sum(torch.stack([values.sum(), torch.ones_like(values).sum()])).tolist()
        return total / max(count, 1.0)


ALGORITHM = TwoStage
