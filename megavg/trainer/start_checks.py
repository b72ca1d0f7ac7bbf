"""What is looked at before the first step of a new run, so that a mistake costs a minute and not a day."""

from __future__ import annotations

import dataclasses

from megavg.data.prompts import Prompts
from megavg.parallel.context import ParallelContext
from megavg.protocols.options import LabelNoise
from megavg.trainer.bad_data import BadData, told_to_all
from megavg.trainer.collect import make_source
from megavg.trainer.config import RunConfig
from megavg.trainer.frame_check import FrameReport, check_frame, known_samples
from megavg.trainer.policy import Policy
from megavg.trainer.rollouts import thought_of


def check_start(config: RunConfig, policy: Policy, prompts: Prompts, context: ParallelContext,
                uses_rollouts: bool) -> FrameReport | None:
    """Check the thoughts that supervised fine-tuning learns, and the frame of the starting model's answers.

    All ranks call it. The samples are those that training begins with, without label noise.

    Returns:
        What the frame check saw, or None where ``data.check_frame`` is off.

    Raises:
        BadData: on every rank, where training should not start.
    """
    data = dataclasses.replace(config.data, num_workers=0)  # for a few pictures no process is started
    if data.thinking and not uses_rollouts:
        with make_source(data, context.dp_size, config.trainer.seed, context, LabelNoise()) as source:
            with told_to_all(context):
                for sample in source.next_batch():
                    thought_of(sample)
    if data.check_frame == "off":
        return None
    size = -(-data.check_frame_samples // context.dp_size) * context.dp_size
    with make_source(data, size, config.trainer.seed, context, LabelNoise()) as source:
        samples = known_samples(source.next_batch, data.check_frame_samples, context)
    report = check_frame(policy, samples, prompts.question, config.rollout.max_new_tokens, context, uses_rollouts)
    if report.stops and data.check_frame == "stop":
        raise BadData(report.message())
    return report
