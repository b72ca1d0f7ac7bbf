"""Crops and resizes keep the named pixels under their box."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megavg.data.crops import crop_around, resize
from megavg.data.sample import check_sample
from megavg.data.scenes import draw_scene
from megavg.protocols.sample import Sample


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**9), width=st.integers(20, 140), height=st.integers(20, 90))
def test_pixels_under_the_box_stay(seed, width, height):
    rng = random.Random(seed)
    sample = draw_scene(rng, (120, 80), 1, 3)
    cut = crop_around(sample, rng, width, height)
    x0, y0, x1, y1 = (int(edge) for edge in sample.boxes_xyxy_px[0])
    fits = width <= 120 and height <= 80 and x1 - x0 <= width and y1 - y0 <= height
    assert (cut is not None) == fits
    if cut is None:
        return
    check_sample(cut)
    assert cut.image.size == (cut.width, cut.height) == (width, height) and cut.key == f"{sample.key}-crop"
    a0, b0, a1, b1 = (int(edge) for edge in cut.boxes_xyxy_px[0])
    assert np.array_equal(np.asarray(cut.image)[b0:b1, a0:a1], np.asarray(sample.image)[y0:y1, x0:x1])
    left, top, *_ = cut.meta["crop_xyxy_px"]
    assert (a0 + left, b0 + top) == (x0, y0)


def test_windows_reach_every_place_and_hold_all_boxes(make_sample):
    sample = make_sample(1, boxes_xyxy_px=((10.25, 6.0, 12.0, 8.0), (11.0, 7.0, 13.5, 9.75)))
    places = {crop_around(sample, random.Random(i), 8, 8).meta["crop_xyxy_px"][0] for i in range(300)}
    assert places == {6, 7, 8, 9, 10}
    assert crop_around(sample, random.Random(0), 3, 8) is None
    assert crop_around(sample, random.Random(0), 25, 8) is None


@settings(max_examples=200, deadline=None)
@given(size=st.integers(2, 600), share=st.floats(0, 0.99), width=st.integers(1, 1400))
def test_scaled_boxes_never_leave_the_image(size, share, width):
    sample = Sample("k", "", Image.new("RGB", (size, 3)), size, 3, "it", ((share * size, 1.0, float(size), 3.0),))
    scaled = resize(sample, width, 7)
    check_sample(scaled)
    assert scaled.boxes_xyxy_px[0][2:] == (width, 7)
    assert scaled.boxes_xyxy_px[0][0] == pytest.approx(share * width)


def test_resize_after_crop(make_sample):
    cut = crop_around(make_sample(1, boxes_xyxy_px=((4.0, 4.0, 8.0, 10.0),)), random.Random(0), 12, 12, (36, 24), "c7")
    x0, y0, x1, y1 = cut.boxes_xyxy_px[0]
    assert cut.image.size == (36, 24) and (x1 - x0, y1 - y0) == (12.0, 12.0) and cut.key.endswith("-c7")
    assert resize(cut, 36, 24) is cut
