"""Reward answers that are written exactly in the form of their model family, whatever their boxes."""

from __future__ import annotations

from megavg.ops.box_text import strict_format
from megavg.protocols.sample import Completion, RewardResult, Sample


def reward(completion: Completion, sample: Sample, *, thinking: bool = False) -> RewardResult:
    """Score 1 when the whole text is one well-formed answer with readable boxes, else 0.

    Args:
        completion: the answer; one cut off by the length limit scores 0.
        sample: not looked at.
        thinking: True demands ``<think>...</think><answer>...</answer>`` around the answer, False forbids it.

    Returns:
        The score, and "ok", "truncated" or what :func:`megavg.ops.box_text.strict_format` found.
    """
    if completion.truncated:
        return RewardResult(0.0, "truncated")
    fault = strict_format(completion.text, completion.box_format, thinking=thinking)
    return RewardResult(0.0, fault) if fault else RewardResult(1.0, "ok")
