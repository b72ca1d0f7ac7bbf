"""Reward near misses too: the generalised overlap of the answered boxes with the true ones."""

from __future__ import annotations

from megavg.protocols.sample import Completion, RewardResult, Sample
from megavg.rewards import iou


def reward(completion: Completion, sample: Sample) -> RewardResult:
    """Score as the reward ``iou`` with ``kind: giou`` does: each pair counts (GIoU + 1) / 2, 0..1.

    A box beside the true one scores up to 0.5, and less the farther it lies.

    Source: Rezatofighi et al., "Generalized Intersection over Union", arXiv 1902.09630.
    """
    return iou.reward(completion, sample, kind="giou")
