"""NoisyRollout [reported] (arXiv 2504.13055): half of the answers are sampled on a noisy image, less so over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Sequence

from megavg.algorithms._mixed_rollouts import MixedRollouts, with_pixels
from megavg.protocols.options import Perturbation

if TYPE_CHECKING:
    from megavg.protocols.batch import EncodedPrompt
    from megavg.protocols.policy import Answer, Explorer


class NoisyRollout(MixedRollouts):
    """GRPO with groups of clean and of noisy rollouts, trained on the clean image. [reported]

    The noisy image has gone through diffusion_step * (1 - 1 / (1 + exp(-steepness (tau - midpoint)))) steps of a
    diffusion of 1000 steps, rounded down, tau from 0 to 1 over the training; below one step there is no noise. The
    noisy answers to a prompt share one draw. There is no importance correction.
    """

    mark = "[reported]"

    @dataclass(frozen=True)
    class Config(MixedRollouts.Config):
        """Options of the noise beside GRPO's and ``num_clean``; the paper's run has its midpoint at step 20 of 60.

        Attributes:
            diffusion_step: where the noise starts, of 1000 steps.
            midpoint: share of the training after which half of these steps are left.
            steepness: of the fall around it.
        """

        diffusion_step: int = 500
        midpoint: float = 1 / 3
        steepness: float = 30.0

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.diffusion_step < 1000:
                raise ValueError(f"diffusion_step={self.diffusion_step} must be in 0..999")
            if self.steepness < 0:
                raise ValueError(f"steepness={self.steepness} must not be negative")

    def noise_step(self, progress: float) -> int:
        """Diffusion steps of the noisy images at ``progress`` of the training."""
        fall = math.tanh(self.config.steepness * (progress - self.config.midpoint) / 2)
        return int(self.config.diffusion_step * (1 - fall) / 2)  # a logistic by tanh, which cannot overflow

    def other_prompts(self, explorer: Explorer, answers: Sequence[Sequence[Answer]],
                      progress: float) -> list[EncodedPrompt] | None:
        """The prompts on images with this step's noise."""
        from megavg.ops.perturb import perturb

        step = self.noise_step(progress)
        self.metrics |= {"noisy_rollout/diffusion_step": float(step)}
        if step < 1:
            return None
        how = Perturbation("diffusion", diffusion_step=step)
        return [with_pixels(prompt, lambda pixels: perturb(pixels, explorer.pixels, how,
                                                           explorer.generator(p, "noisy_rollout")))
                for p, prompt in enumerate(explorer.prompts)]


ALGORITHM = NoisyRollout
