"""An algorithm outside the package: learn only from answers that are better than their group's mean.

A method is one file: a subclass of ``Algorithm`` under the name ``ALGORITHM``. Its module is named with dots, from the
repository root or from any folder on PYTHONPATH:

    deepspeed megavg/train.py --config examples/demo.yaml algorithm.name=examples.custom_algorithm

It can be joined with others (``algorithm.name=examples.custom_algorithm+dapo``), because it calls ``super()`` and
replaces only what it changes; and its options are read and checked like all others
(``algorithm.worse_answers=0.25``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavg.algorithms.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megavg.protocols.batch import RolloutBatch, TokenScores


class PositiveOnly(Algorithm):
    """GRPO whose tokens with a negative advantage weigh less, or nothing. [ours]"""

    mark = "[ours]"  # where the definition comes from; the docstring must say the same

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """Options of this method beside GRPO's.

        Attributes:
            worse_answers: what the loss of a token with a negative advantage is multiplied by.
        """

        worse_answers: float = 0.0

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.worse_answers <= 1:
                raise ValueError(f"worse_answers={self.worse_answers} must be in 0..1")

    def weights(self, batch: RolloutBatch, stats: TokenScores, advantages: torch.Tensor,
                progress: float) -> torch.Tensor:
        """Weights of the methods behind, times ``worse_answers`` where the advantage is negative [B, T]."""
        weights = super().weights(batch, stats, advantages, progress)
        worse = batch.mask & (advantages < 0)
        # a figure for the log, over all data-parallel ranks
        self.metrics["positive_only/worse_tokens"] = float(batch.mean(worse.float()))
        return weights.where(~worse, weights * self.config.worse_answers)


ALGORITHM = PositiveOnly
