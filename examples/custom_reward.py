"""A reward outside the package: how near the middle of the answered box is to the middle of the true one.

A reward is one function in one file. Name the file, relative to the folder that the training is started in, or the
module with dots, from the repository root or from any folder on PYTHONPATH:

    rewards:
      - {name: iou, weight: 1.0}
      - {name: examples/custom_reward.py, weight: 0.2, falls_to_zero_at: 0.5}

    deepspeed megavg/train.py --config examples/demo.yaml 'rewards=[{name: examples.custom_reward}]'

Its keyword-only arguments are its options: they are checked like all others. Four rules hold for every reward
(``megavg/rewards/base.py``): the score is finite and in 0..1; it is 0 for an answer that cannot be read; nothing that
the model wrote raises an error or is evaluated; and the reason is a few words that can be counted.
"""

from __future__ import annotations

import math

from megavg.ops.boxes import center
from megavg.ops.box_text import parse_boxes
from megavg.protocols.sample import Completion, RewardResult, Sample


def reward(completion: Completion, sample: Sample, *, falls_to_zero_at: float = 0.25) -> RewardResult:
    """Score 1 where the middles of the first answered box and a true box meet, falling with their distance to 0.

    Args:
        completion: the answer and the frame it is written in; the parser gives back original pixels.
        sample: the true boxes, in original pixels.
        falls_to_zero_at: distance, as a share of the image's diagonal, at which the score is 0.

    Returns:
        The score, and "ok", "too far", "no true box" or the parser's reason.
    """
    answer = parse_boxes(completion.text, completion.frame, completion.box_format)
    if not answer.boxes_px:
        return RewardResult(0.0, answer.reason)
    if not sample.boxes_xyxy_px:
        return RewardResult(0.0, "no true box")
    middle = center(answer.boxes_px[0])
    distance = min(math.dist(middle, center(box)) for box in sample.boxes_xyxy_px)
    share = distance / math.hypot(sample.width, sample.height)
    score = max(0.0, 1 - share / falls_to_zero_at)
    return RewardResult(score, "ok" if score > 0 else "too far")


def check_options(falls_to_zero_at: float = 0.25) -> None:
    """Called once, before the training starts: raise ValueError on an option that makes no sense."""
    if not 0 < falls_to_zero_at <= 1:
        raise ValueError(f"custom_reward.falls_to_zero_at: expected 0 < share <= 1, got {falls_to_zero_at!r}")
