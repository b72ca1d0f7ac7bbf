"""Groups whose answers are sampled partly on the image and partly on another version of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Sequence

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import EncodedPrompt
    from megavg.protocols.policy import Answer, Explorer


class MixedRollouts(Algorithm):
    """GRPO whose later answers come from ``other_prompts``; one group, one advantage, update on the clean image."""

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options beside GRPO's.

        Attributes:
            num_clean: answers of each group that are sampled on the clean image; null takes half of them.
        """

        num_clean: int | None = None

        def __post_init__(self):
            super().__post_init__()
            if self.num_clean is not None and self.num_clean < 1:
                raise ValueError(f"num_clean={self.num_clean} must be at least 1")

    def check(self, group_size: int, max_new_tokens: int) -> None:
        super().check(group_size, max_new_tokens)
        if (self.config.num_clean or 0) > group_size:
            raise ValueError(f"algorithm.num_clean={self.config.num_clean} is more than "
                             f"rollout.group_size={group_size}")

    def explore(self, explorer: Explorer, progress: float) -> list[list[Answer]]:
        """Sample num_clean answers on the clean images and the rest on the others, numbered on."""
        group_size = explorer.group_size
        num_clean = self.config.num_clean or max(1, group_size // 2)
        answers = explorer.sample(num_clean)
        if num_clean == group_size:
            return answers
        others = self.other_prompts(explorer, answers, progress)
        rest = explorer.sample(group_size - num_clean, num_clean, others)
        if others is not None:
            rest = [[replace(answer, on_clean=answer.on_clean and other is prompt) for answer in group]
                    for group, prompt, other in zip(rest, explorer.prompts, others)]
        return [first + second for first, second in zip(answers, rest)]

    def other_prompts(self, explorer: Explorer, answers: Sequence[Sequence[Answer]],
                      progress: float) -> list[EncodedPrompt] | None:
        """The prompts with the other images; a prompt without an image as it is; None where all stay clean.

        ``explorer`` is collective, so only options and ``progress`` may decide about the calls and about None.
        """
        return None


def with_pixels(prompt: EncodedPrompt, change: Callable[[torch.Tensor], torch.Tensor]) -> EncodedPrompt:
    """``prompt`` with ``change(pixel_values)``; the same object where it has no image."""
    return replace(prompt, pixel_values=change(prompt.pixel_values)) if prompt.image_grid_thw else prompt
