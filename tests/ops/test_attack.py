"""The attack on pixels: the ball, the valid range and equal copies hold for the numbers as they are stored."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.ops.attack import ascend, random_signs
from megavg.protocols.pixels import PixelLayout

LAYOUT = PixelLayout(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
                     temporal_patch_size=2, patch_size=4)
ONE_FRAME = PixelLayout(mean=(0.5,), std=(0.5,), temporal_patch_size=1, patch_size=3)


def image(num_patches: int, layout: PixelLayout = LAYOUT, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """A still image with 8-bit pixels, black and white ones among them, as a processor stores it."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-40, 296, (num_patches, len(layout.mean), 1, layout.patch_size**2), generator=generator)
    raw = raw.clamp(0, 255).to(dtype) / 255
    mean, std = layout.per_channel(layout.mean, raw), layout.per_channel(layout.std, raw)
    return ((raw - mean) / std).repeat(1, 1, layout.temporal_patch_size, 1).flatten(1)


def gradient_like(pixels: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Unequal on the copies of a frame, and zero here and there."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype)
    return values * (torch.rand(pixels.shape, generator=generator) > 0.2)


def assert_inside(found: torch.Tensor, clean: torch.Tensor, layout: PixelLayout, eps: float) -> None:
    """Each stored number, in double precision and without a tolerance."""
    frames, middle = layout.split(found).double(), layout.split(clean).double()
    black, white = layout.bounds(clean)
    for c, std in enumerate(layout.std):
        assert float((frames[:, c] - middle[:, c]).abs().max()) <= eps / std
    stored = layout.split(found)
    assert ((stored >= black) & (stored <= white) | (stored == layout.split(clean))).all()
    assert torch.equal(frames[:, :, :1].expand_as(frames), frames)


@pytest.mark.parametrize("layout", [LAYOUT, ONE_FRAME], ids=["three channels", "one channel"])
@pytest.mark.parametrize("eps, step", [(4 / 255, 4 / 255), (4 / 255, 2.5 / 255), (0.3, 0.3), (1e-7, 1e-7), (1.0, 2.0)])
def test_a_step_stays_inside(eps, step, layout):
    clean = image(200, layout)
    now = clean
    for k in range(4):
        now = ascend(now, clean, gradient_like(clean, k), layout, eps, step)
        assert_inside(now, clean, layout, eps)
        assert now.dtype == clean.dtype and now.shape == clean.shape


@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_bfloat16_stays_inside(eps):
    """Also where a ball is narrower than the distance of two numbers."""
    clean = image(50).bfloat16()
    found = ascend(clean, clean, gradient_like(clean), LAYOUT, eps, eps)
    assert_inside(found, clean, LAYOUT, eps)
    assert found.dtype == torch.bfloat16 and not torch.equal(found, clean)


def test_against_a_loop_over_pixels():
    clean, eps, step = image(6), 8 / 255, 5 / 255
    gradients = [gradient_like(clean, seed) for seed in (3, 4)]
    gradients[0].view(6, 3, 2, 16)[:, :, :, 5] = torch.tensor([1.5, -1.5])  # they cancel
    found = clean
    for gradient in gradients:
        found = ascend(found, clean, gradient, LAYOUT, eps, step)
    values, start = LAYOUT.split(found), LAYOUT.split(clean)
    moved = 0
    for n in range(6):
        for c in range(3):
            mean, std = LAYOUT.mean[c], LAYOUT.std[c]
            for q in range(16):
                original = float(start[n, c, 0, q]) * std + mean
                pixel = original
                for gradient in gradients:
                    total = math.fsum(LAYOUT.split(gradient)[n, c, :, q].tolist())
                    pixel += step * ((total > 0) - (total < 0))
                    pixel = min(max(pixel, original - eps, 0.0), original + eps, 1.0)
                moved += abs(pixel - original) > 1e-3
                assert values[n, c, :, q].tolist() == pytest.approx([(pixel - mean) / std] * 2, abs=1e-6)
    assert moved > 100


def test_nothing_is_changed_in_place():
    clean, gradient = image(5), gradient_like(image(5))
    now = ascend(clean, clean, gradient, LAYOUT, 0.1, 0.05)
    copies = [t.clone() for t in (now, clean, gradient)]
    ascend(now, clean, gradient, LAYOUT, 0.1, 0.05)
    assert all(torch.equal(t, copy) for t, copy in zip((now, clean, gradient), copies))


def test_no_eps_returns_the_clean_image_and_no_gradient_moves_nothing():
    clean = image(20)
    assert ascend(clean + 1, clean, gradient_like(clean), LAYOUT, 0.0, 0.1) is clean
    assert torch.equal(ascend(clean, clean, torch.zeros_like(clean), LAYOUT, 0.1, 0.1), clean)


@pytest.mark.parametrize("end, outward", [(0, -1.0), (1, 1.0)], ids=["black", "white"])
def test_an_end_that_was_rounded_outward_may_stay(end, outward):
    bound = LAYOUT.bounds(torch.zeros(1))[end]
    clean = bound.expand(3, 1, 32).reshape(1, 96).nextafter(torch.tensor(9 * outward))
    away = torch.full_like(clean, outward)
    assert torch.equal(ascend(clean, clean, away, LAYOUT, 1e-8, 1e-8), clean)
    back = ascend(clean, clean, -away, LAYOUT, 0.1, 0.1)
    assert_inside(back, clean, LAYOUT, 0.1)
    assert ((clean - back) * outward > 0.3).all()


def test_negative_sizes_are_refused():
    clean = image(1)
    with pytest.raises(ValueError, match="eps=-0.1"):
        ascend(clean, clean, clean, LAYOUT, -0.1, 0.1)


def test_random_signs():
    pixels = image(500)
    signs = random_signs(pixels, LAYOUT, torch.Generator().manual_seed(2))
    assert signs.shape == pixels.shape and signs.dtype == pixels.dtype and signs.abs().eq(1).all()
    frames = LAYOUT.split(signs)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    count = frames[:, :, 0].numel()
    assert abs(float(frames[:, :, 0].sum())) < 4 * math.sqrt(count)
    assert torch.equal(signs, random_signs(pixels, LAYOUT, torch.Generator().manual_seed(2)))
    assert not torch.equal(signs, random_signs(pixels, LAYOUT, torch.Generator().manual_seed(3)))
    found = ascend(pixels, pixels, signs, LAYOUT, 0.02, 0.02)
    assert_inside(found, pixels, LAYOUT, 0.02)


def test_a_text_without_an_image():
    empty = torch.empty(0, 96)
    assert ascend(empty, empty, empty, LAYOUT, 0.1, 0.1).shape == (0, 96)
    assert random_signs(empty, LAYOUT, torch.Generator()).shape == (0, 96)
