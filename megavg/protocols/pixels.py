"""How a processor lays an image out as normalised patches, and the scale of one pixel in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PixelLayout:
    """The meaning of ``pixel_values`` [num_patches, channels * temporal * patch * patch].

    Attributes:
        mean, std: per channel; a pixel x in 0..1 is stored as (x - mean) / std.
        temporal_patch_size: frames of a patch; those of a still image are copies of one another.
        patch_size: side of a patch in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal_patch_size: int
    patch_size: int

    def split(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """A view [num_patches, channels, temporal, patch * patch] of ``pixel_values``."""
        return pixel_values.view(pixel_values.shape[0], len(self.mean), self.temporal_patch_size, self.patch_size**2)

    def per_channel(self, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """One number a channel, shaped to meet what ``split`` gives: [channels, 1, 1]."""
        return like.new_tensor(values)[:, None, None]

    def bounds(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(black, white): the stored values of 0 and 1, each [channels, 1, 1]."""
        mean, std = self.per_channel(self.mean, like), self.per_channel(self.std, like)
        return -mean / std, (1 - mean) / std
