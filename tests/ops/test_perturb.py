"""Perturbations of images: the formulas in double precision, equal copies along time, statistics of the noise."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.ops.perturb import diffusion_signal, perturb
from megavg.protocols.options import Perturbation
from megavg.protocols.pixels import PixelLayout

LAYOUT = PixelLayout(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), temporal_patch_size=2, patch_size=4)
KINDS = ("gaussian", "diffusion", "no_image", "patch_mask")


def image(num_patches: int, layout: PixelLayout = LAYOUT, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """A still image of random pixels as a processor stores it."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(num_patches, len(layout.mean), 1, layout.patch_size**2, generator=generator)
    mean, std = layout.per_channel(layout.mean, raw), layout.per_channel(layout.std, raw)
    return ((raw - mean) / std).repeat(1, 1, layout.temporal_patch_size, 1).flatten(1).to(dtype)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_signal() -> list[float]:
    """abar, step by step in Python's double precision."""
    out, left = [], 1.0
    for t in range(1000):
        x = -6 + 12 * t / 999
        left *= 1 - (1 / (1 + math.exp(-x)) * (5e-3 - 1e-5) + 1e-5)
        out.append(left)
    return out


def test_the_diffusion_schedule():
    expected = slow_signal()
    assert diffusion_signal().tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] > 0.9999 and 0.5 < expected[500] < 0.9 and expected[999] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_shape_dtype_copies_and_the_untouched_input(kind, dtype):
    pixels = image(30, dtype=dtype)
    before = pixels.clone()
    found = perturb(pixels, LAYOUT, Perturbation(kind), chance())
    assert torch.equal(pixels, before) and found.data_ptr() != pixels.data_ptr()
    assert found.shape == pixels.shape and found.dtype == dtype and not torch.equal(found, pixels)
    frames = LAYOUT.split(found)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_chance_comes_from_the_generator_alone(kind):
    pixels = image(30)
    first, again, other = (perturb(pixels, LAYOUT, Perturbation(kind), chance(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "no_image")
    torch.manual_seed(5)
    assert torch.equal(first, perturb(pixels, LAYOUT, Perturbation(kind), chance(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_an_image_stays_empty(kind):
    assert perturb(torch.empty(0, 96), LAYOUT, Perturbation(kind), chance()).shape == (0, 96)


@pytest.mark.parametrize("kind, step", [("gaussian", 0), ("diffusion", 0), ("diffusion", 500), ("diffusion", 999)])
def test_noise_is_added_as_the_formula_says(kind, step):
    """Against a loop over numbers that draws the noise in the same order."""
    pixels, how = image(3), Perturbation(kind, std=1.7, diffusion_step=step)
    draws = iter(torch.randn(3 * 3 * 16, generator=chance(4)).tolist())
    found = LAYOUT.split(perturb(pixels, LAYOUT, how, chance(4)))
    frames = LAYOUT.split(pixels)
    left = slow_signal()[step]
    for n in range(3):
        for c in range(3):
            for q in range(16):
                noise, x = next(draws), float(frames[n, c, 0, q])
                expected = x + 1.7 * noise if kind == "gaussian" else math.sqrt(left) * x + math.sqrt(1 - left) * noise
                assert found[n, c, :, q].tolist() == pytest.approx([expected] * 2, abs=2e-6)


@pytest.mark.parametrize("how, deviation", [(Perturbation("gaussian", std=2.0), 2.0),
                                            (Perturbation("diffusion"), math.sqrt(1 - slow_signal()[500]))])
def test_statistics_of_the_noise(how, deviation):
    noise = LAYOUT.split(perturb(torch.zeros(2000, 96), LAYOUT, how, chance()))[:, :, 0]
    count = noise.numel()  # 96,000: three standard errors of the mean and of the deviation
    assert abs(float(noise.mean())) < 3 * deviation / math.sqrt(count)
    assert float(noise.std()) == pytest.approx(deviation, abs=3 * deviation / math.sqrt(2 * count))


def test_zero_noise_is_the_image():
    pixels = image(5)
    assert torch.equal(perturb(pixels, LAYOUT, Perturbation("gaussian", std=0.0), chance()), pixels)


def test_no_image_is_the_mean_colour():
    assert not perturb(image(5), LAYOUT, Perturbation("no_image"), chance()).any()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("num_patches", [1, 7, 40])
def test_masked_patches_are_black_and_the_others_as_they_were(share, num_patches):
    pixels = image(num_patches)
    found = perturb(pixels, LAYOUT, Perturbation("patch_mask", mask_share=share), chance())
    black = LAYOUT.split(found).clone()
    for c in range(3):
        black[:, c] = -LAYOUT.mean[c] / LAYOUT.std[c]
    is_black = [torch.allclose(row, want, atol=1e-6) for row, want in zip(found, black.flatten(1))]
    assert sum(is_black) == round(share * num_patches)
    assert all(torch.equal(row, old) for row, old, dark in zip(found, pixels, is_black) if not dark)


def test_every_patch_is_masked_alike_often():
    how, pixels = Perturbation("patch_mask", mask_share=0.5), image(8)
    generator = chance(3)
    masked = sum((perturb(pixels, LAYOUT, how, generator) != pixels).any(1).float() for _ in range(400))
    assert ((masked - 200).abs() < 4 * 10).all()  # 4 standard deviations of 400 tosses
