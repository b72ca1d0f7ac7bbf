"""What a rank does in a step, as far as memory depends on it. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Sizes of a step and options of a run.

    Attributes:
        image_patches: of each prompt's image.
        prompt_tokens: of each prompt, beside the image's.
        answer_tokens: the longest answer, which is taken for all.
        micro_batch: answers per forward and backward.
        group_size: answers to each prompt.
        prompts_per_step: over all ranks; 0 takes the smallest multiple of the data-parallel size that is 16 or more.
        prompts_per_pass: prompts that a rank generates for at once, at most.
        dtype: float32 or bfloat16.
        reference: a frozen copy of the starting model is kept.
        recompute, offload, freeze_vision_tower: options of the run; offload is of the optimiser.
    """

    image_patches: int = 4900
    prompt_tokens: int = 100
    answer_tokens: int = 256
    micro_batch: int = 1
    group_size: int = 8
    prompts_per_step: int = 0
    prompts_per_pass: int = 16
    dtype: str = "bfloat16"
    reference: bool = False
    recompute: bool = False
    offload: bool = False
    freeze_vision_tower: bool = False

    def check(self, dp: int) -> None:
        """Refuse a data-parallel size that does not divide the prompts of a step."""
        if self.prompts_per_step % dp:
            raise ValueError(f"--prompts-per-step={self.prompts_per_step} is not divisible by the data-parallel size "
                             f"{dp}; choose a multiple, or leave it out")

    def prompts(self, dp: int) -> int:
        """Prompts of a step over all ranks."""
        return self.prompts_per_step or dp * math.ceil(16 / dp)

    def num_micro_batches(self, dp: int) -> int:
        """Of one rank in a step."""
        return math.ceil(self.prompts(dp) // dp * self.group_size / self.micro_batch)

    def prompt_length(self, merge: int) -> int:
        """Tokens of a prompt with its image, of whose patches ``merge`` become one."""
        return self.prompt_tokens + math.ceil(self.image_patches / merge)

    def micro_batch_sizes(self, merge: int) -> tuple[int, int, int]:
        """(tokens, patches, scored tokens) of the largest micro-batch; an image that answers share counts once."""
        tokens = self.micro_batch * (self.prompt_length(merge) + self.answer_tokens)
        aligned = self.group_size % self.micro_batch == 0 or self.micro_batch % self.group_size == 0
        images = math.ceil(self.micro_batch / self.group_size) if aligned else \
            math.ceil((self.micro_batch - 1) / self.group_size) + 1  # some micro-batch begins inside a group
        return tokens, images * self.image_patches, self.micro_batch * self.answer_tokens

    def pass_prompts(self, dp: int) -> int:
        """Prompts that a rank generates for at once."""
        return min(self.prompts_per_pass, self.prompts(dp) // dp)
