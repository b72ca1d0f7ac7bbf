"""Three-axis rotary positions (time, height, width) of a prompt with images, the same for all Qwen-VL families."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def mrope_positions(
    input_ids: Sequence[int] | Tensor, image_token_id: int, image_grids: Sequence[Grid], spatial_merge_size: int
) -> Tensor:
    """Give every token of one sequence its time, height and width position.

    Text counts up by one on all three axes. The tokens of an image that starts at position p get
    ``(p, p + row, p + column)`` in its merged grid, and text goes on after the largest position used so far.

    Args:
        input_ids: ids of one sequence [S], its image tokens already expanded.
        image_token_id: id of ``<|image_pad|>``.
        image_grids: (t, h, w) in patches of each image, in order of appearance; empty for plain text. A still image
            has t = 1.
        spatial_merge_size: patches per token along one side (2 in every released checkpoint).

    Returns:
        Positions [3, S], int64, on the device of ``input_ids``.

    Raises:
        ValueError: the image tokens and the grids disagree, or a grid is not that of a still image.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    if ids.ndim != 1:
        raise ValueError(f"mrope_positions takes one sequence of shape [S], got {list(ids.shape)}; call it per sample")
    grids = [_merged(grid, spatial_merge_size) for grid in image_grids]
    starts = _image_starts((ids == image_token_id).tolist(), grids)

    pieces, cursor, position = [], 0, 0
    for start, (height, width) in zip(starts, grids):
        pieces.append(_text(position, start - cursor))
        position += start - cursor
        pieces.append(_image(position, height, width))
        cursor = start + height * width
        position += max(height, width)
    pieces.append(_text(position, len(ids) - cursor))
    return torch.cat(pieces, dim=1).to(ids.device)


def next_position(positions: Tensor) -> int:
    """The position, on all three axes, of the first token generated after ``positions`` [3, S]."""
    return int(positions.max()) + 1 if positions.numel() else 0


def _merged(grid: Grid, merge: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""
    time, height, width = (int(size) for size in grid)
    if time != 1:
        raise ValueError(f"image grid {(time, height, width)} has t = {time}: only still images (t = 1) are supported")
    if height < 1 or width < 1 or height % merge or width % merge:
        raise ValueError(f"image grid {(time, height, width)} is not divisible by the spatial merge size {merge}; "
                         "take it from the checkpoint's own image processor")
    return height // merge, width // merge


def _image_starts(is_image: list[bool], grids: list[tuple[int, int]]) -> list[int]:
    """Index of each image's first token, after checking that every image's tokens stand together."""
    expected = sum(height * width for height, width in grids)
    if sum(is_image) != expected:
        raise ValueError(f"image tokens {sum(is_image)}, grid says {expected} for {len(grids)} image(s); "
                         "expand the image token t * h * w / merge^2 times")
    starts, cursor = [], 0
    for number, (height, width) in enumerate(grids):
        start = is_image.index(True, cursor)
        cursor = start + height * width
        if not all(is_image[start:cursor]):
            raise ValueError(f"image {number} has fewer than {height * width} image tokens in a row from token "
                             f"{start}; are the grids in the order of the images?")
        starts.append(start)
    return starts


def _text(position: int, count: int) -> Tensor:
    return torch.arange(position, position + count).expand(3, -1)


def _image(position: int, height: int, width: int) -> Tensor:
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns]) + position
