"""From samples to answers: encode the prompts, sample or write the answers, and judge them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Sequence

import torch

from megavg.evaluation.rows import answer_row
from megavg.models.processor import Processor
from megavg.ops.answer_text import format_answer
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import DIGITS, EncodedPrompt, RolloutBatch
from megavg.protocols.sample import Completion, Frame, RewardResult, Sample
from megavg.rewards.base import OTHER_TASK, Term, score
from megavg.trainer.token_kinds import TokenKinds


@dataclass
class Rollouts:
    """Answers to this rank's samples, before any tensor is made of them.

    Attributes:
        samples, prompts: P of each.
        responses: B token lists, G per prompt.
        truncated: B flags.
        group_size: G.
        streams: B names of each answer's chance, or none for written answers.
        sampling_logprobs: [B, T] as reported while sampling, or None for written answers.
        on_clean: B flags, False where an answer was sampled from another image than its prompt's.
    """

    samples: list[Sample]
    prompts: list[EncodedPrompt]
    responses: list[list[int]]
    truncated: list[bool]
    group_size: int
    streams: list[str] = field(default_factory=list)
    sampling_logprobs: torch.Tensor | None = None
    on_clean: list[bool] = field(default_factory=list)

    @property
    def prompt_of_row(self) -> list[int]:
        return [b // self.group_size for b in range(len(self.responses))]

    @property
    def width(self) -> int:
        return max(len(response) for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, prompts counted once per answer."""
        return sum(self.row_tokens)

    @property
    def row_tokens(self) -> list[int]:
        """Tokens of each row, prompt and answer."""
        return [len(self.prompts[p].input_ids) + len(r) for p, r in zip(self.prompt_of_row, self.responses)]


def encode(samples: Sequence[Sample], processor: Processor, question: Callable[[Sample], str]) -> list[EncodedPrompt]:
    """One prompt per sample; an error names the sample."""
    prompts = []
    for sample in samples:
        try:
            prompts.append(processor.encode_prompt(sample.image, question(sample)))
        except ValueError as error:
            raise ValueError(f"{sample.shard}: sample {sample.key}: {error}") from error
    return prompts


def written_answers(samples: list[Sample], prompts: list[EncodedPrompt], processor: Processor,
                    thinking: bool = False) -> Rollouts:
    """The true answers as text in the family's own frame: what supervised fine-tuning learns.

    Args:
        thinking: write each as ``<think>...</think><answer>...</answer>`` with the record's own "thought".

    Raises:
        ValueError: naming the sample, where its answer cannot be written or its thought is missing.
    """
    responses = [processor.encode_answer(_written(sample, prompt.frame, processor.box_format, thinking))
                 for sample, prompt in zip(samples, prompts)]
    return Rollouts(samples, prompts, responses, [False] * len(samples), group_size=1)


def _written(sample: Sample, frame: Frame, box_format: str, thinking: bool) -> str:
    answer = format_answer(sample, frame, box_format)
    return f"<think>{thought_of(sample)}</think><answer>{answer}</answer>" if thinking else answer


def thought_of(sample: Sample) -> str:
    """The "thought" of a record, which supervised fine-tuning learns beside the answer.

    Raises:
        ValueError: naming the sample, where it has none.
    """
    thought = sample.meta.get("thought")
    if not isinstance(thought, str) or not thought.strip():
        raise ValueError(f"{sample.shard}: sample {sample.key!r} has no \"thought\", which supervised fine-tuning with "
                         "data.thinking=true learns beside the answer; put one into every record, or set "
                         "data.thinking=false")
    return thought


def completions(rollouts: Rollouts, processor: Processor) -> list[Completion]:
    """Every answer as rewards and evaluation see it."""
    return [Completion(processor.decode(response), processor.box_format, rollouts.prompts[p].frame, len(response),
                       truncated)
            for p, response, truncated in zip(rollouts.prompt_of_row, rollouts.responses, rollouts.truncated)]


@dataclass(frozen=True)
class Judgement:
    """What came of judging B answers.

    Attributes:
        rewards: B weighted sums.
        rows: B evaluation rows (text, predicted boxes, IoU, reason).
        results: B times what each reward said, by its name.
    """

    rewards: list[float]
    rows: list[dict]
    results: list[dict[str, RewardResult]]

    def part(self, start: int, stop: int) -> Judgement:
        """That of the answers ``start:stop``."""
        return Judgement(self.rewards[start:stop], self.rows[start:stop], self.results[start:stop])

    @classmethod
    def joined(cls, parts: Sequence[Judgement]) -> Judgement:
        """That of the answers of all parts, one after the other."""
        return cls([r for part in parts for r in part.rewards], [r for part in parts for r in part.rows],
                   [r for part in parts for r in part.results])

    @property
    def term_totals(self) -> dict[str, tuple[float, int]]:
        """(sum of the unweighted scores, number of answers) of each reward, over the answers that it judged."""
        names = self.results[0] if self.results else ()
        judged = {name: [result[name].score for result in self.results if result[name] != OTHER_TASK] for name in names}
        return {name: (sum(scores), len(scores)) for name, scores in judged.items()}

    @property
    def reasons(self) -> Counter:
        """How often each reward gave each reason, without the answers whose task it does not judge."""
        return Counter(f"{name}: {result.reason}" for results in self.results for name, result in results.items()
                       if result != OTHER_TASK)


def judge(rollouts: Rollouts, processor: Processor, terms: Sequence[Term]) -> Judgement:
    """Reward every answer, and look at it as the evaluation does."""
    rewards, rows, results = [], [], []
    for p, completion in zip(rollouts.prompt_of_row, completions(rollouts, processor)):
        sample = rollouts.samples[p]
        total, by_name = score(completion, sample, terms)
        rewards.append(total)
        rows.append(answer_row(sample, completion))
        results.append(by_name)
    return Judgement(rewards, rows, results)


def to_batch(rollouts: Rollouts, rewards: Sequence[float], kinds: TokenKinds, context: ParallelContext,
             max_new_tokens: int = 0) -> RolloutBatch:
    """Pad the answers into tensors."""
    width = rollouts.width
    ids = torch.full((len(rollouts.responses), width), kinds.pad_token_id)
    mask = torch.zeros(len(rollouts.responses), width, dtype=torch.bool)
    for b, response in enumerate(rollouts.responses):
        ids[b, :len(response)] = torch.tensor(response)
        mask[b, :len(response)] = True
    token_kinds = kinds.batch(rollouts.responses, width)
    device = context.device
    return RolloutBatch(
        ids.to(device), mask.to(device), torch.tensor(rewards, dtype=torch.float32, device=device),
        rollouts.group_size, (token_kinds == DIGITS).to(device), context.sum_over_data, context.gather_values,
        token_kinds.to(device), _noisy(rollouts, context), max_new_tokens, rollouts.streams)


def _noisy(rollouts: Rollouts, context: ParallelContext) -> torch.Tensor | None:
    """[B] bool, or None where no sample of any rank says whether its label is noise."""
    if not context.max_over_data(int(any("noisy" in sample.meta for sample in rollouts.samples))):
        return None
    flags = [bool(rollouts.samples[p].meta.get("noisy")) for p in rollouts.prompt_of_row]
    return torch.tensor(flags, device=context.device)
