"""Move an image's pixels uphill, inside an L-infinity ball around the clean image."""

from __future__ import annotations

import torch

from megavg.protocols.pixels import PixelLayout


def ascend(pixel_values: torch.Tensor, clean: torch.Tensor, gradient: torch.Tensor, layout: PixelLayout, eps: float,
           step: float) -> torch.Tensor:
    """One step of projected sign ascent: clip(x + step sign(gradient)) to the ball of ``eps`` and to valid pixels.

    ``eps`` and ``step`` are in pixels of 0..1 and divided by each channel's std, since ``pixel_values`` are normalised.
    The gradient is summed over the copies of a still image along time, which therefore stay equal; sign(0) = 0.
    The bounds hold for the fp32 numbers as they are stored, not only before rounding. eps = 0 returns ``clean`` itself.

    Args:
        pixel_values, clean, gradient: [num_patches, channels * temporal * patch * patch]; where the step starts, the
            middle of the ball, and the direction.
    """
    if eps < 0 or step < 0:
        raise ValueError(f"eps={eps} and step={step} must not be negative")
    if eps == 0:
        return clean
    start, middle = layout.split(pixel_values).double(), layout.split(clean).double()
    direction = layout.split(gradient.to(clean.device, torch.float64)).sum(2, keepdim=True).sign()
    std = layout.per_channel(layout.std, middle)
    black, white = (bound.double() for bound in layout.bounds(clean))
    # a processor that rounds otherwise stores white a little above white: such a pixel may stay, not go further
    low, high = (middle - eps / std).maximum(black.minimum(middle)), (middle + eps / std).minimum(white.maximum(middle))
    stored = (start + step / std * direction).clamp(low, high).to(clean.dtype)
    # rounding may have led out of the ball by one unit in the last place
    infinity = torch.full_like(stored, torch.inf)
    stored = stored.nextafter(-infinity).where(stored > high, stored)
    stored = stored.nextafter(infinity).where(stored < low, stored)
    return stored.view_as(clean)


def random_signs(pixel_values: torch.Tensor, layout: PixelLayout, generator: torch.Generator) -> torch.Tensor:
    """+1 or -1 for each pixel, equal on the copies along time: a direction that knows nothing of the model."""
    frames = layout.split(pixel_values)
    signs = torch.randint(0, 2, (frames.shape[0], frames.shape[1], 1, frames.shape[3]), generator=generator) * 2 - 1
    return signs.to(pixel_values.device, pixel_values.dtype).expand_as(frames).reshape_as(pixel_values)
