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
        patch_dim: numbers of one patch, C of ``pixel_values``.
        with_images: False on pipeline stages behind the first, which have no use for pixels and get none.
    """

    def __init__(self, image_token_id: int, pad_token_id: int, spatial_merge_size: int, patch_dim: int,
                 dtype: torch.dtype, device: torch.device, with_images: bool = True):
        self.image_token_id, self.pad_token_id, self.merge = image_token_id, pad_token_id, spatial_merge_size
        self.patch_dim, self.dtype, self.device, self.with_images = patch_dim, dtype, device, with_images

    def build(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int],
              responses: Sequence[Sequence[int]], packed: bool = True) -> ModelInputs:
        """One row per response; row b answers ``prompts[prompt_of_row[b]]`` and is scored on all its tokens.

        Rows are laid end to end, or padded to the longest with ``packed=False``.
        """
        rows = [self._row(prompts[p], response) for p, response in zip(prompt_of_row, responses, strict=True)]
        lengths = [ids.shape[0] for ids, _, _ in rows]
        join = self._end_to_end if packed else self._padded
        return ModelInputs(*(t.to(self.device) for t in (*join(rows, lengths), *self._images(prompts),
                                                         self._feature_index(prompts, prompt_of_row))),
                           tuple(lengths) if packed and len(lengths) > 1 else None)

    def positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """[3, S] mrope positions of a prompt."""
        return mrope_positions(prompt.input_ids, self.image_token_id, prompt.image_grid_thw, self.merge)

    def _row(self, prompt: EncodedPrompt, response: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """(token ids [S], positions [3, S], target ids [S]) of a prompt with its answer."""
        ids = torch.tensor([*prompt.input_ids, *response])
        start = len(prompt.input_ids)
        positions = self.positions(prompt)
        following = torch.arange(len(response)).expand(3, -1) + next_position(positions)
        targets = torch.full_like(ids, IGNORE)
        targets[start - 1:-1] = ids[start:]  # the logits at position s predict token s + 1
        return ids, torch.cat([positions, following], 1), targets

    def _end_to_end(self, rows, lengths) -> tuple[torch.Tensor, ...]:
        ids, positions, targets = zip(*rows)
        return torch.cat(ids)[None], torch.cat(positions, 1)[:, None], torch.cat(targets)[None]

    def _padded(self, rows, lengths) -> tuple[torch.Tensor, ...]:
        shape = len(rows), max(lengths)
        input_ids, target_ids = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        position_ids = torch.zeros(3, *shape, dtype=torch.int64)
        for b, (ids, positions, targets) in enumerate(rows):
            input_ids[b, :lengths[b]], target_ids[b, :lengths[b]] = ids, targets
            position_ids[:, b, :lengths[b]] = positions
        return input_ids, position_ids, target_ids

    def _images(self, prompts: Sequence[EncodedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
        grids = [grid for prompt in prompts for grid in prompt.image_grid_thw]
        if not self.with_images:
            return torch.zeros(0, self.patch_dim, dtype=self.dtype), torch.zeros(0, 3, dtype=torch.int64)
        if grids:
            return torch.cat([prompt.pixel_values for prompt in prompts]).to(self.dtype), torch.tensor(grids)
        # ranks of one group must run the same modules, so a batch of text shows the vision tower a grey image
        return (torch.zeros(self.merge**2, self.patch_dim, dtype=self.dtype),
                torch.tensor([[1, self.merge, self.merge]]))

    def _feature_index(self, prompts: Sequence[EncodedPrompt], prompt_of_row: Sequence[int]) -> torch.Tensor:
        ranges, start = [], 0
        for prompt in prompts:
            count = sum(time * height * width for time, height, width in prompt.image_grid_thw) // self.merge**2
            ranges.append(torch.arange(start, start + count))
            start += count
        return torch.cat([ranges[p] for p in prompt_of_row])


def scatter_rows(values: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """[N] scored values, rows one after the other -> [B, width], zeros on the right."""
    out = values.new_zeros(len(lengths), width)
    mask = torch.arange(width, device=values.device)[None] < torch.tensor(lengths, device=values.device)[:, None]
    return out.masked_scatter(mask, values)
