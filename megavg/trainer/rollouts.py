"""From samples to answers: encode the prompts, sample or write the answers, and judge them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable, Sequence

import torch

from megavg.evaluation.grounding import GroundingScores
from megavg.models.processor import Processor
from megavg.ops.box_text import format_boxes
from megavg.protocols.batch import EncodedPrompt, RolloutBatch
from megavg.protocols.sample import Completion, Sample
from megavg.rewards.base import Term, score


@dataclass
class Rollouts:
    """Answers to this rank's samples, before any tensor is made of them.

    Attributes:
        samples, prompts: P of each.
        responses: B token lists, G per prompt.
        truncated: B flags.
        group_size: G.
        sampling_logprobs: [B, T] as reported while sampling, or None for written answers.
    """

    samples: list[Sample]
    prompts: list[EncodedPrompt]
    responses: list[list[int]]
    truncated: list[bool]
    group_size: int
    sampling_logprobs: torch.Tensor | None = None

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


def encode(samples: Sequence[Sample], processor: Processor, question: Callable[[str], str]) -> list[EncodedPrompt]:
    """One prompt per sample; an error names the sample."""
    prompts = []
    for sample in samples:
        try:
            prompts.append(processor.encode_prompt(sample.image, question(sample.expression)))
        except ValueError as error:
            raise ValueError(f"{sample.shard}: sample {sample.key}: {error}") from error
    return prompts


def written_answers(samples: list[Sample], prompts: list[EncodedPrompt], processor: Processor) -> Rollouts:
    """The true boxes as text in the family's own frame: what supervised fine-tuning learns."""
    responses = [processor.encode_answer(format_boxes(sample.boxes_xyxy_px, prompt.frame, processor.box_format))
                 for sample, prompt in zip(samples, prompts)]
    return Rollouts(samples, prompts, responses, [False] * len(samples), group_size=1)


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
        term_means: mean unweighted score of each reward.
        reasons: how often each reward gave each reason.
    """

    rewards: list[float]
    rows: list[dict]
    term_means: dict[str, float]
    reasons: Counter


def judge(rollouts: Rollouts, processor: Processor, terms: Sequence[Term]) -> Judgement:
    """Reward every answer, and look at its boxes as the evaluation does."""
    rewards, rows, reasons = [], [], Counter()
    sums: Counter = Counter()
    for p, completion in zip(rollouts.prompt_of_row, completions(rollouts, processor)):
        sample = rollouts.samples[p]
        total, results = score(completion, sample, terms)
        rewards.append(total)
        rows.append(GroundingScores().add(sample, completion))
        for name, result in results.items():
            sums[name] += result.score
            reasons[f"{name}: {result.reason}"] += 1
    return Judgement(rewards, rows, {term.name: sums[term.name] / len(rewards) for term in terms}, reasons)


def to_batch(rollouts: Rollouts, rewards: Sequence[float], processor: Processor, device: torch.device,
             all_sum: Callable[[torch.Tensor], torch.Tensor]) -> RolloutBatch:
    """Pad the answers into tensors."""
    width = rollouts.width
    ids = torch.full((len(rollouts.responses), width), processor.pad_token_id)
    mask = torch.zeros(len(rollouts.responses), width, dtype=torch.bool)
    for b, response in enumerate(rollouts.responses):
        ids[b, :len(response)] = torch.tensor(response)
        mask[b, :len(response)] = True
    digits = torch.isin(ids, torch.tensor(processor.digit_token_ids, dtype=torch.int64)) & mask
    return RolloutBatch(ids.to(device), mask.to(device), torch.tensor(rewards, dtype=torch.float32, device=device),
                        rollouts.group_size, digits.to(device), all_sum)
