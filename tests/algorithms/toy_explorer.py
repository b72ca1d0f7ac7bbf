"""A small but real policy for tests of ``explore``: it looks at pixels, samples, scores and gives gradients."""

from __future__ import annotations

from typing import Sequence

import torch

from megavg.ops.chance import generator, uniforms
from megavg.protocols.batch import EncodedPrompt, TokenScores
from megavg.protocols.pixels import PixelLayout
from megavg.protocols.policy import Answer

LAYOUT = PixelLayout(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), temporal_patch_size=2, patch_size=2)
VOCABULARY, END = 11, 0


def prompts_of(num_patches: Sequence[int], seed: int = 0) -> list[EncodedPrompt]:
    """Still images of random pixels with these numbers of patches; 0 is a prompt without an image."""
    chance = torch.Generator().manual_seed(seed)
    out = []
    for n in num_patches:
        raw = torch.rand(n, 3, 1, 4, generator=chance)
        mean, std = LAYOUT.per_channel(LAYOUT.mean, raw), LAYOUT.per_channel(LAYOUT.std, raw)
        pixels = ((raw - mean) / std).repeat(1, 1, 2, 1).flatten(1)
        out.append(EncodedPrompt([1, 2], pixels, ((1, 1, n),) if n else (), None))
    return out


class ToyExplorer(torch.nn.Module):
    """Two layers from the mean of the patches and the token before to the next token's logits; see ``Explorer``.

    ``calls`` lists what was asked, which has to be the same on every rank.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], group_size: int, seed: int = 0, max_new_tokens: int = 9):
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.prompts, self.group_size, self.pixels = prompts, group_size, LAYOUT
        self.max_new_tokens, self.calls = max_new_tokens, []
        self.eye, self.token, self.head = (
            torch.nn.Parameter(scale * torch.randn(*shape, generator=chance))
            for scale, shape in ((0.4, (24, 16)), (1.0, (VOCABULARY, 16)), (0.9, (16, VOCABULARY))))

    def log_softmax(self, pixels: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """[T, V] after each of the tokens ``before`` [T]."""
        seen = (pixels @ self.eye).tanh().mean(0) if len(pixels) else torch.zeros(16)
        return ((2 * seen + self.token[before]).tanh() @ self.head).log_softmax(-1)

    def sample(self, num_answers: int, first: int = 0,
               prompts: Sequence[EncodedPrompt] | None = None) -> list[list[Answer]]:
        self.calls.append(("sample", num_answers, first))
        return [[self._answer(prompt, f"sample{p}/{first + i}") for i in range(num_answers)]
                for p, prompt in enumerate(self.prompts if prompts is None else prompts)]

    @torch.no_grad()
    def _answer(self, prompt: EncodedPrompt, stream: str) -> Answer:
        tokens, logprobs = [1], []
        for u in uniforms(stream, self.max_new_tokens).tolist():
            scores = self.log_softmax(prompt.pixel_values, torch.tensor(tokens[-1:]))[0]
            token = min(int((scores.exp().cumsum(0) <= u).sum()), VOCABULARY - 1)
            tokens.append(token)
            logprobs.append(float(scores[token]))
            if token == END:
                break
        return Answer(tokens[1:], torch.tensor(logprobs), tokens[-1] != END)

    def scores(self, answers: Sequence[Sequence[Answer]],
               prompts: Sequence[EncodedPrompt] | None = None) -> tuple[TokenScores, torch.Tensor]:
        self.calls.append(("scores",))
        pixels = [prompt.pixel_values for prompt in (self.prompts if prompts is None else prompts)]
        with torch.no_grad():
            return self.scored(answers, pixels)

    def scored(self, answers, pixels: Sequence[torch.Tensor]) -> tuple[TokenScores, torch.Tensor]:
        rows = [(answer, image) for group, image in zip(answers, pixels) for answer in group]
        width = max(len(answer.tokens) for answer, _ in rows)
        logprobs, entropy, mask = [], [], torch.zeros(len(rows), width, dtype=torch.bool)
        for b, (answer, image) in enumerate(rows):
            length = len(answer.tokens)
            scores = self.log_softmax(image, torch.tensor([1, *answer.tokens[:-1]]))
            mask[b, :length] = True
            for out, values in ((logprobs, scores[torch.arange(length), answer.tokens]),
                                (entropy, -(scores.exp() * scores).sum(-1))):
                out.append(torch.nn.functional.pad(values, (0, width - length)))
        return TokenScores(torch.stack(logprobs), torch.stack(entropy)), mask

    def entropy_gradients(self, answers: Sequence[Sequence[Answer]], weights: torch.Tensor,
                          prompts: Sequence[EncodedPrompt] | None = None) -> list[torch.Tensor]:
        self.calls.append(("entropy_gradients",))
        pixels = [prompt.pixel_values.clone().requires_grad_()
                  for prompt in (self.prompts if prompts is None else prompts)]
        total = (weights * self.scored(answers, pixels)[0].entropy).sum()
        found = torch.autograd.grad(total, pixels, allow_unused=True)
        return [torch.zeros_like(image) if gradient is None else gradient for image, gradient in zip(pixels, found)]

    def generator(self, prompt: int, purpose: str) -> torch.Generator:
        return generator(f"{prompt}/{purpose}")
