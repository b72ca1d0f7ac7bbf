"""Reward the right name of a class."""

from __future__ import annotations

from megavg.ops.answer_text import class_name, normal_name
from megavg.protocols.sample import Completion, RewardResult, Sample


def reward(completion: Completion, sample: Sample) -> RewardResult:
    """Score 1 where the answer is exactly one of the right names, without regard to case, blanks, quotes and a stop.

    The whole answer must be the name, or one JSON object with it under ``label``: a name inside of a sentence, or one
    of several names, scores 0, as does an empty answer.

    Args:
        completion: the answer.
        sample: its ``labels`` are the right names; a sample of another task has none.

    Returns:
        The score, and "ok", "wrong class", "no class" (nothing that could be one name) or "no true class".
    """
    answered = class_name(completion.text)
    if not answered:
        return RewardResult(0.0, "no class")
    # The labels of other tasks are the classes of boxes: naming one of them is no answer.
    names = {normal_name(label) for label in sample.labels if sample.task == "classification"} - {""}
    if not names:
        return RewardResult(0.0, "no true class")
    return RewardResult(1.0, "ok") if answered in names else RewardResult(0.0, "wrong class")
