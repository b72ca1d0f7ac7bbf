"""SaEI [ours, from the abstract of arXiv 2512.10414 and a reported objective]: raise entropy through the image.

The paper's code was not available, so this is the project's own definition in its spirit: answers are sampled on the
image, the image is moved uphill along the gradient of the entropy of their middling tokens, and the rest of the group
is sampled on it. Near-certain tokens carry facts and format, the most uncertain ones noise; neither is pushed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Sequence

from megavg.algorithms._mixed_rollouts import MixedRollouts, with_pixels

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import EncodedPrompt, RolloutBatch, TokenScores
    from megavg.protocols.policy import Answer, Explorer


class SaEI(MixedRollouts):
    """GRPO whose groups end with answers to an image attacked for entropy; trained on the clean image. [ours]

    I' = clip(I + eps sign(grad J)), J = sum of H over S / |S|, S the tokens of the first answers whose H lies between
    two quantiles (of linear interpolation) of the group's, both included; all of its tokens where none does. S stays
    fixed over the steps; each of several is 2.5 eps / steps and projected back. No parameter receives a gradient, and
    there is no importance correction. eps = 0 is GRPO. The ball holds for pixels in fp32; a model in bf16 rounds them
    once more, to 8 bits.
    """

    mark = "[ours]"

    @dataclass(frozen=True)
    class Config(MixedRollouts.Config):
        """Options of the attack beside GRPO's and ``num_clean``.

        Attributes:
            eps: how far a pixel may move, in pixels of 0..1.
            steps: of the ascent.
            quantile_low, quantile_high: bounds of the tokens' entropy inside a group's.
            direction: ``random_sign`` moves each pixel by eps at random, as a control of the gradient.
            tokens: ``all`` takes J over all tokens, as a control of the selection.
            report_gain: log J on the clean and on the attacked images, for one more pass of scoring.
        """

        eps: float = 4 / 255
        steps: int = 1
        quantile_low: float = 0.5
        quantile_high: float = 0.95
        direction: Literal["gradient", "random_sign"] = "gradient"
        tokens: Literal["selected", "all"] = "selected"
        report_gain: bool = False

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.eps <= 1:
                raise ValueError(f"eps={self.eps} must be in 0..1; pixels are, so 4 of 255 is 0.0157")
            if self.steps < 1:
                raise ValueError(f"steps={self.steps} must be at least 1; eps=0 switches the attack off")
            if not 0 <= self.quantile_low <= self.quantile_high <= 1:
                raise ValueError(f"expected 0 <= quantile_low <= quantile_high <= 1, got {self.quantile_low} and "
                                 f"{self.quantile_high}")

    def __init__(self, config: Config):
        super().__init__(config)
        self._gains = [0.0, 0.0, 0.0]  # J clean, J attacked, number of prompts with an image, since the last update

    def explore(self, explorer: Explorer, progress: float) -> list[list[Answer]]:
        """Sample num_clean answers on the clean images and the rest on the attacked ones, numbered on."""
        if self.config.eps == 0:  # in one call, as GRPO does: other batches might round otherwise
            return explorer.sample(explorer.group_size)
        return super().explore(explorer, progress)

    def other_prompts(self, explorer: Explorer, answers: Sequence[Sequence[Answer]],
                      progress: float) -> list[EncodedPrompt]:
        """The prompts on the attacked images."""
        config = self.config
        if config.direction == "random_sign" and not config.report_gain:
            return self._at_random(explorer)
        scores, mask = explorer.scores(answers)
        weights = self._token_weights(scores.entropy, mask, len(explorer.prompts))
        if config.direction == "random_sign":
            attacked = self._at_random(explorer)
        else:
            attacked = self._uphill(explorer, answers, weights)
        if config.report_gain:
            after = explorer.scores(answers, attacked)[0]
            self._add_gains(explorer.prompts, weights * scores.entropy, weights * after.entropy)
        return attacked

    def advantages(self, batch: RolloutBatch, stats: TokenScores) -> torch.Tensor:
        """GRPO's; also logs how much the attacks of this optimiser batch have raised J."""
        import torch

        if self.config.report_gain and self.config.eps > 0:
            gains = torch.tensor(self._gains, dtype=torch.float64, device=batch.rewards.device)
            before, after, count = batch.all_sum(gains).tolist()
            self.metrics |= {"saei/entropy_clean": before / max(count, 1.0),
                             "saei/entropy_attacked": after / max(count, 1.0)}
            self._gains = [0.0, 0.0, 0.0]
        return super().advantages(batch, stats)

    def _token_weights(self, entropy: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
        """1 / |S| on the tokens of S, 0 elsewhere [P * n, T]; J of a prompt is the sum of weight times entropy."""
        import torch

        rows = []
        for values, valid in zip(entropy.double().reshape(num_prompts, -1), mask.reshape(num_prompts, -1)):
            chosen = valid
            if self.config.tokens == "selected" and valid.any():
                low, high = values[valid].quantile(values.new_tensor([self.config.quantile_low,
                                                                      self.config.quantile_high]))
                between = valid & (values >= low) & (values <= high)
                chosen = between if between.any() else valid
            rows.append(chosen.double() / chosen.sum().clamp_min(1))
        return torch.stack(rows).reshape(entropy.shape).to(entropy.dtype)

    def _uphill(self, explorer: Explorer, answers: Sequence[Sequence[Answer]],
                weights: torch.Tensor) -> list[EncodedPrompt]:
        from megavg.ops.attack import ascend

        eps, steps = self.config.eps, self.config.steps
        step = eps if steps == 1 else 2.5 * eps / steps
        attacked = list(explorer.prompts)
        for _ in range(steps):
            gradients = explorer.entropy_gradients(answers, weights, attacked)
            attacked = [with_pixels(now, lambda pixels: ascend(pixels, prompt.pixel_values, gradient, explorer.pixels,
                                                               eps, step))
                        for now, prompt, gradient in zip(attacked, explorer.prompts, gradients)]
        return attacked

    def _at_random(self, explorer: Explorer) -> list[EncodedPrompt]:
        from megavg.ops.attack import ascend, random_signs

        def move(pixels: torch.Tensor, p: int) -> torch.Tensor:
            signs = random_signs(pixels, explorer.pixels, explorer.generator(p, "saei"))
            return ascend(pixels, pixels, signs, explorer.pixels, self.config.eps, self.config.eps)

        return [with_pixels(prompt, lambda pixels: move(pixels, p)) for p, prompt in enumerate(explorer.prompts)]

    def _add_gains(self, prompts: Sequence[EncodedPrompt], before: torch.Tensor, after: torch.Tensor) -> None:
        """Add J of this rank's prompts that have an image; ``before`` and ``after`` are its terms [P * n, T]."""
        sums = (terms.double().reshape(len(prompts), -1).sum(1).tolist() for terms in (before, after))
        for prompt, *both in zip(prompts, *sums):
            if prompt.image_grid_thw:
                self._gains = [total + new for total, new in zip(self._gains, (*both, 1.0))]


ALGORITHM = SaEI
