"""GRPO [exact]: the defaults of ``Algorithm``, unchanged."""

from __future__ import annotations

from megavg.algorithms.base import Algorithm


class GRPO(Algorithm):
    """Group-relative policy optimisation: the advantage of an answer is its reward against its group's. [exact]"""


ALGORITHM = GRPO
