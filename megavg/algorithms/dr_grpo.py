"""Dr. GRPO [exact] (arXiv 2503.20783): no division by the deviation of a group or by the length of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megavg.algorithms.base import Algorithm


class DrGRPO(Algorithm):
    """GRPO whose advantage is reward minus mean, summed over tokens and divided by a constant. [exact]"""

    @dataclass(frozen=True)
    class Config(Algorithm.Config):
        """GRPO's options; the defaults of normalize_std and aggregation are what makes the method."""

        aggregation: Literal["response_mean", "token_mean", "constant"] = "constant"
        normalize_std: bool = False


ALGORITHM = DrGRPO
