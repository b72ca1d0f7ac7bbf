"""Perturb an image on its normalised pixels, to see what an answer owes to it."""

from __future__ import annotations

import functools

import torch

from megavg.protocols.options import Perturbation
from megavg.protocols.pixels import PixelLayout

NUM_DIFFUSION_STEPS = 1000


@functools.lru_cache(maxsize=1)
def diffusion_signal() -> torch.Tensor:
    """abar [1000] fp64: what share of the image's variance is left after each step of the sigmoid schedule.

    beta_t = sigmoid(linspace(-6, 6, 1000))_t * (5e-3 - 1e-5) + 1e-5, abar_t = product of (1 - beta_s) over s <= t, from
    step 0 on, as in the code released with VCD (arXiv 2311.16922), which VEPO and NoisyRollout take over.
    """
    betas = torch.linspace(-6, 6, NUM_DIFFUSION_STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)


def perturb(pixel_values: torch.Tensor, layout: PixelLayout, how: Perturbation,
            generator: torch.Generator) -> torch.Tensor:
    """A perturbed copy of ``pixel_values`` [num_patches, channels * temporal * patch * patch]; the input stays.

    The copies of a still image along time get the same noise. Noise is drawn on the CPU in fp32, so that it does not
    depend on the device or the dtype. ``patch_mask`` blackens round(mask_share * num_patches) patches.

    Args:
        generator: on the CPU; the same state gives the same result.
    """
    if how.kind == "no_image":
        return torch.zeros_like(pixel_values)
    if how.kind == "patch_mask":
        return _mask_patches(pixel_values, layout, how.mask_share, generator)
    frames = layout.split(pixel_values)
    noise = torch.randn(frames.shape[0], frames.shape[1], 1, frames.shape[3], generator=generator)
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    noise = noise.to(wide.device, wide.dtype)
    if how.kind == "gaussian":
        mixed = wide + how.std * noise
    elif how.kind == "diffusion":
        left = float(diffusion_signal()[how.diffusion_step])
        mixed = left**0.5 * wide + (1 - left) ** 0.5 * noise
    else:
        raise ValueError(f"perturbation.kind={how.kind!r} is not one of gaussian, diffusion, no_image, patch_mask")
    return mixed.to(pixel_values.dtype).view_as(pixel_values)


def _mask_patches(pixel_values: torch.Tensor, layout: PixelLayout, share: float,
                  generator: torch.Generator) -> torch.Tensor:
    num_patches = pixel_values.shape[0]
    order = torch.randperm(num_patches, generator=generator)
    masked = order[:round(share * num_patches)].to(pixel_values.device)
    result = pixel_values.clone()
    layout.split(result)[masked] = layout.bounds(pixel_values)[0]
    return result
