"""Reward answers that are written exactly in the form of their task and model family, whatever they say."""

from __future__ import annotations

from megavg.ops.strict_text import strict_format
from megavg.protocols.sample import Completion, RewardResult, Sample


def reward(completion: Completion, sample: Sample, *, thinking: bool = False) -> RewardResult:
    """Score 1 when the whole text is one well-formed answer of the sample's task, else 0.

    The forms are those of :func:`megavg.ops.strict_text.strict_format`: readable boxes for rec and detection (which may
    be "None"), a point, or one line with a class.

    Args:
        completion: the answer; one cut off by the length limit scores 0.
        sample: its task; the truth is not looked at.
        thinking: True demands ``<think>...</think><answer>...</answer>`` around the answer, False forbids it.

    Returns:
        The score, and "ok", "truncated" or what :func:`megavg.ops.strict_text.strict_format` found.
    """
    if completion.truncated:
        return RewardResult(0.0, "truncated")
    fault = strict_format(completion.text, completion.box_format, thinking=thinking, task=sample.task)
    return RewardResult(0.0, fault) if fault else RewardResult(1.0, "ok")
