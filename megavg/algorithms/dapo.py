"""DAPO [exact] (arXiv 2503.14476): clip higher, mean over all tokens, no KL, resampling, soft overlong punishment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch


class DAPO(Algorithm):
    """GRPO with a wider upper clip, the mean over all tokens, and groups that teach something. [exact]

    Groups whose rewards, as judged, are all equal are drawn anew, a bounded number of times. An answer of n tokens gets
    (L_max - cache - n) / cache, from 0 down to -1, added to its reward where n > L_max - cache.
    """

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of DAPO; its defaults of clip_high, aggregation and kl_coefficient are the paper's.

        Attributes:
            resample_tries: how many further batches of prompts may be drawn to replace groups whose rewards are equal.
            overlong_cache: tokens before rollout.max_new_tokens where the punishment of length sets in; 0 switches it
                off.
        """

        clip_high: float = 0.28
        kl_coefficient: float = 0.0
        aggregation: Literal["response_mean", "token_mean", "constant"] = "token_mean"
        resample_tries: int = 10
        overlong_cache: int = 0

        def __post_init__(self):
            super().__post_init__()
            for name in ("resample_tries", "overlong_cache"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def resampling_tries(self) -> int:
        return self.config.resample_tries

    def check(self, group_size: int, max_new_tokens: int) -> None:
        super().check(group_size, max_new_tokens)
        if self.config.overlong_cache > max_new_tokens:
            raise ValueError(f"algorithm.overlong_cache={self.config.overlong_cache} is more than "
                             f"rollout.max_new_tokens={max_new_tokens}; choose a smaller one")

    def rewards(self, batch: RolloutBatch) -> torch.Tensor:
        """Rewards [B] with the punishment of length added."""
        rewards, cache = super().rewards(batch), self.config.overlong_cache
        if not cache:
            return rewards
        into = batch.mask.sum(1) - (batch.max_new_tokens - cache)
        return rewards - into.clamp_min(0) / cache


ALGORITHM = DAPO
