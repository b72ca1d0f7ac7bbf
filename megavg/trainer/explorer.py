"""What an algorithm may do with the behaviour policy before the answers of a batch are complete: protocols.policy."""

from __future__ import annotations

from typing import Sequence

import torch

from megavg.models.inputs import scatter_rows
from megavg.ops.chance import generator
from megavg.protocols.batch import EncodedPrompt, TokenScores
from megavg.protocols.options import SamplingParams
from megavg.protocols.pixels import PixelLayout
from megavg.protocols.policy import Answer
from megavg.trainer.policy import Policy
from megavg.trainer.step import MicroBatcher


class PolicyExplorer:
    """The trained policy with this rank's prompts of one draw; see ``Explorer``.

    Args:
        streams: names of the prompts' chance.
        group_size: G.
        batcher: cuts answers into micro-batches.
    """

    def __init__(self, policy: Policy, prompts: Sequence[EncodedPrompt], streams: Sequence[str], group_size: int,
                 sampling: SamplingParams, batcher: MicroBatcher, temperature: float):
        self.prompts, self.group_size = prompts, group_size
        self.pixels: PixelLayout = policy.processor.pixel_layout
        self._policy, self._streams, self._sampling = policy, streams, sampling
        self._batcher, self._temperature = batcher, temperature

    def sample(self, num_answers: int, first: int = 0,
               prompts: Sequence[EncodedPrompt] | None = None) -> list[list[Answer]]:
        """[P][num_answers] answers, numbered from ``first``."""
        prompts = self.prompts if prompts is None else prompts
        made = self._policy.sync().generate(prompts, num_answers, self._sampling, self._streams, first)
        logprobs = made.logprobs.cpu()
        answers = [Answer(tokens, logprobs[b, :len(tokens)], made.truncated[b])
                   for b, tokens in enumerate(made.responses)]
        return [answers[start:start + num_answers] for start in range(0, len(answers), num_answers)]

    def scores(self, answers: Sequence[Sequence[Answer]],
               prompts: Sequence[EncodedPrompt] | None = None) -> tuple[TokenScores, torch.Tensor]:
        """Teacher-force [P][n] answers: (scores [P * n, T], mask [P * n, T])."""
        where, width = self._rows(answers, prompts)
        found = self._policy.score(*where, width, self._temperature)
        lengths = [len(response) for response in where[2]]
        device = found.logprobs.device
        return found, scatter_rows(torch.ones(sum(lengths), device=device), lengths, width) > 0

    def entropy_gradients(self, answers: Sequence[Sequence[Answer]], weights: torch.Tensor,
                          prompts: Sequence[EncodedPrompt] | None = None) -> list[torch.Tensor]:
        """The gradient of sum(weights * entropy) to each prompt's ``pixel_values``."""
        where, _ = self._rows(answers, prompts)
        return self._policy.entropy_gradients(*where, weights, self._temperature)

    def generator(self, prompt: int, purpose: str) -> torch.Generator:
        """Chance that depends on the run's seed, the step, the sample and ``purpose`` alone."""
        return generator(f"{self._streams[prompt]}/{purpose}")

    def _rows(self, answers, prompts):
        """(prompts, prompt of each row, responses, micro-batches) and the longest response."""
        prompts = self.prompts if prompts is None else prompts
        responses = [answer.tokens for group in answers for answer in group]
        prompt_of_row = [p for p, group in enumerate(answers) for _ in group]
        rows = self._batcher.rows(prompts, prompt_of_row, responses)
        return (prompts, prompt_of_row, responses, rows), max(map(len, responses))
