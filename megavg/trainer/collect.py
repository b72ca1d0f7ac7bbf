"""Draw prompts, let the algorithm sample answers to them, judge these, and replace groups that teach nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Sequence

import torch

from megavg.algorithms.base import Algorithm
from megavg.data.batches import BatchSource
from megavg.data.mixture import Mixture
from megavg.data.shards import PromptSource
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import EncodedPrompt
from megavg.protocols.options import LabelNoise
from megavg.protocols.policy import Answer
from megavg.protocols.sample import Sample
from megavg.rewards.base import Term
from megavg.trainer.bad_data import told_to_all
from megavg.trainer.config import DataConfig, RunConfig
from megavg.trainer.explorer import PolicyExplorer
from megavg.trainer.metrics import PhaseClock
from megavg.trainer.policy import Policy
from megavg.trainer.prompt_log import PromptLog
from megavg.trainer.rollouts import Judgement, Rollouts, encode, judge, written_answers
from megavg.trainer.step import MicroBatcher


def make_source(data: DataConfig, batch_size: int, seed: int, context: ParallelContext,
                noise: LabelNoise) -> BatchSource:
    """The training data of a configuration, as this data-parallel rank reads it."""
    sources = {name: (source.shards, source.weight) for name, source in data.sources().items()}
    return (Mixture if sources else PromptSource)(
        sources or data.shards, batch_size, seed, context.dp_rank, context.dp_size, data.shuffle_buffer, data.on_error,
        data.max_skipped, noise=noise, shuffle_bytes=data.shuffle_bytes, num_workers=data.num_workers,
        prefetch_batches=data.prefetch_batches, agree=context.gather_rows if context.dp_size > 1 else None)


@dataclass(frozen=True)
class Group:
    """The judged answers to one prompt.

    Attributes:
        number: its place among all groups that were drawn for the optimiser batch, over all ranks.
        stream: name of its chance.
    """

    number: int
    sample: Sample
    prompt: EncodedPrompt
    stream: str
    answers: list[Answer]
    judgement: Judgement

    @property
    def teaches(self) -> bool:
        """Whether its rewards differ, as judged; what an algorithm adds to them, for length, makes no difference."""
        return min(self.judgement.rewards) < max(self.judgement.rewards)


class Collector:
    """Makes the answers of one optimiser batch.

    Attributes:
        metrics: of the last batch, where groups may be drawn anew.
    """

    def __init__(self, policy: Policy, source: BatchSource, algorithm: Algorithm, rewards: Sequence[Term],
                 config: RunConfig, context: ParallelContext, batcher: MicroBatcher, clock: PhaseClock,
                 prompts: PromptLog):
        self.policy, self.source, self.algorithm, self.rewards = policy, source, algorithm, rewards
        self.config, self.context, self.batcher, self.clock = config, context, batcher, clock
        self._prompts = prompts
        self.metrics: dict[str, float] = {}

    def prompts(self) -> tuple[list[Sample], list[EncodedPrompt]]:
        """This rank's share of the next batch of prompts."""
        with told_to_all(self.context):
            samples = self.source.next_batch()
            prompts = encode(samples, self.policy.processor, self._prompts.question)
        self._prompts.tell(samples)
        self.clock.lap("data")
        return samples, prompts

    def written(self) -> Rollouts:
        """The true answers to this rank's share of the next batch: what supervised fine-tuning learns."""
        samples, prompts = self.prompts()
        with told_to_all(self.context):
            return written_answers(samples, prompts, self.policy.processor, self.config.data.thinking)

    def collect(self, step: int, progress: float) -> tuple[Rollouts, Judgement]:
        """G judged answers to each of this rank's prompts."""
        groups = self.groups(step, progress)
        rollouts = _rollouts([group.sample for group in groups], [group.prompt for group in groups],
                             [group.stream for group in groups], [group.answers for group in groups])
        return rollouts, Judgement.joined([group.judgement for group in groups])

    def groups(self, step: int, progress: float) -> list[Group]:
        """This rank's groups of the optimiser batch.

        Where the algorithm asks for it, groups whose rewards are all equal give way to groups of further batches of
        prompts, as long as tries are left. Which groups are taken depends on their numbers alone, not on the layout.
        """
        groups, tries = self._draw(step, 0, progress), self.algorithm.resampling_tries
        self.metrics = {}
        if not tries:
            return groups
        wanted, draws = self.config.data.prompts_per_step, 1
        while self._num_teaching(groups) < wanted and draws <= tries:
            groups += self._draw(step, draws, progress)
            draws += 1
        self.metrics = {"resampling/draws": float(draws),
                        "resampling/teaching": self._num_teaching(groups) / (draws * wanted)}
        return self._choose(groups, wanted)

    def _draw(self, step: int, draw: int, progress: float) -> list[Group]:
        """Sample and judge answers to the next batch of prompts."""
        samples, prompts = self.prompts()
        config, size = self.config, self.config.rollout.group_size
        # keys are unique inside a set of shards; the shard's name tells sets apart wherever they lie
        where = f"{config.trainer.seed}/{step}" + (f"/{draw}" if draw else "")
        streams = [f"{where}/{os.path.basename(sample.shard)}/{sample.key}" for sample in samples]
        explorer = PolicyExplorer(self.policy, prompts, streams, size, config.rollout, self.batcher,
                                  config.rollout.temperature or 1.0)
        answers = self.algorithm.explore(explorer, progress)
        if [len(group) for group in answers] != [size] * len(samples):
            raise ValueError(f"algorithm {config.algorithm_name}: explore must give rollout.group_size={size} answers "
                             f"to each of {len(samples)} prompts, got {[len(group) for group in answers]}")
        self.clock.lap("rollout")
        judgement = judge(_rollouts(samples, prompts, streams, answers), self.policy.processor, self.rewards)
        self.clock.lap("reward")
        first = draw * config.data.prompts_per_step + self.context.dp_rank
        return [Group(first + i * self.context.dp_size, sample, prompts[i], streams[i], answers[i],
                      judgement.part(i * size, (i + 1) * size)) for i, sample in enumerate(samples)]

    def _num_teaching(self, groups: list[Group]) -> int:
        """How many groups of all ranks teach something."""
        return len(self.context.gather_rows([group.number for group in groups if group.teaches]))

    def _choose(self, groups: list[Group], wanted: int) -> list[Group]:
        """This rank's share of the first ``wanted`` groups that teach, filled up with others.

        The group at place k of them belongs to data-parallel rank k % dp_size, as it does without resampling, so some
        groups move to another rank.
        """
        size, rank = self.context.dp_size, self.context.dp_rank
        known = sorted(self.context.gather_rows([(not group.teaches, group.number) for group in groups]))
        chosen = sorted(number for _, number in known[:wanted])
        owner = {number: place % size for place, number in enumerate(chosen)}
        mine = [group for group in groups if owner.get(group.number) == rank]
        moving = [group for group in groups if owner.get(group.number, rank) != rank]
        mine += [group for group in self.context.gather_rows(moving) if owner[group.number] == rank]
        return sorted(mine, key=lambda group: group.number)


def _rollouts(samples: list[Sample], prompts: list[EncodedPrompt], streams: Sequence[str],
              answers: Sequence[Sequence[Answer]]) -> Rollouts:
    flat = [answer for group in answers for answer in group]
    logprobs = torch.zeros(len(flat), max(len(answer.tokens) for answer in flat))
    for b, answer in enumerate(flat):
        logprobs[b, :len(answer.tokens)] = answer.logprobs
    return Rollouts(
        samples, prompts, [answer.tokens for answer in flat], [answer.truncated for answer in flat],
        len(flat) // len(samples), [f"{stream}/{g}" for stream, group in zip(streams, answers)
                                    for g in range(len(group))], logprobs, [answer.on_clean for answer in flat])
