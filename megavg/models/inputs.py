"""Lay prompts and answers out as the model's micro-batches."""

from __future__ import annotations

from typing import Sequence

import torch

from megavg.models.layers.mrope import mrope_positions, next_position
from megavg.protocols.batch import IGNORE, EncodedPrompt, ModelInputs


class InputBuilder:
    """Makes ``ModelInputs`` of one model family.

    Args:
        image_token_id: the token that image features replace.
        pad_token_id: fills sequences up on the right.
        spatial_merge_size: patches per image token and side.
    """

    def __init__(self, image_token_id: int, pad_token_id: int, spatial_merge_size: int, dtype: torch.dtype,
                 device: torch.device):
        self.image_token_id, self.pad_token_id, self.merge = image_token_id, pad_token_id, spatial_merge_size
        self.dtype, self.device = dtype, device

    def build(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
              responses: Sequence[Sequence[int]]) -> ModelInputs:
        """One row per response; row b answers ``prompts[prompt_of_row[b]]`` and is scored on all its tokens."""
        rows = [prompts[p].input_ids + list(response) for p, response in zip(prompt_of_row, responses, strict=True)]
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        target_ids = torch.full((len(rows), length), IGNORE)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.int64)
        positions = [self.positions(prompt) for prompt in prompts]
        for b, (row, p) in enumerate(zip(rows, prompt_of_row)):
            start, end = len(prompts[p].input_ids), len(row)
            input_ids[b, :end] = torch.tensor(row)
            # the logits at position s predict token s + 1
            target_ids[b, start - 1:end - 1] = input_ids[b, start:end]
            position_ids[:, b, :start] = positions[p]
            position_ids[:, b, start:end] = torch.arange(end - start) + next_position(positions[p])
        return ModelInputs(*(t.to(self.device) for t in (
            input_ids, position_ids, target_ids, *self._images(prompts), self._feature_index(prompts, prompt_of_row))))

    def positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """[3, S] mrope positions of a prompt."""
        return mrope_positions(prompt.input_ids, self.image_token_id, [prompt.image_grid_thw], self.merge)

    def _images(self, prompts: Sequence[EncodedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.cat([prompt.pixel_values for prompt in prompts]).to(self.dtype),
                torch.tensor([prompt.image_grid_thw for prompt in prompts]))

    def _feature_index(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int]) -> torch.Tensor:
        ranges, start = [], 0
        for prompt in prompts:
            time, height, width = prompt.image_grid_thw
            count = time * height * width // self.merge**2
            ranges.append(torch.arange(start, start + count))
            start += count
        return torch.cat([ranges[p] for p in prompt_of_row])


def scatter_rows(values: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """[N] scored values, rows one after the other -> [B, width], zeros on the right."""
    out = values.new_zeros(len(lengths), width)
    mask = torch.arange(width, device=values.device)[None] < torch.tensor(lengths, device=values.device)[:, None]
    return out.masked_scatter(mask, values)
