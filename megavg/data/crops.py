"""Cut and resize samples so that their boxes stay true."""

from __future__ import annotations

import dataclasses
import math
import random

from PIL import Image

from megavg.protocols.sample import Sample


def crop_around(sample: Sample, rng: random.Random, crop_width: int, crop_height: int,
                out_size: tuple[int, int] | None = None, suffix: str = "crop") -> Sample | None:
    """Cut a random ``crop_width`` x ``crop_height`` window that wholly contains every box of ``sample``.

    Args:
        rng: chooses among all windows (whole pixels) that lie in the image and contain the boxes, uniformly.
        out_size: (width, height) in pixels that the window is resized to; None keeps it as cut.
        suffix: appended to the key with a "-"; give each crop of one sample its own.

    Returns:
        The new sample; its meta says where the window was ("crop_xyxy_px", in pixels of the input image).
        None when the image is smaller than the window or the boxes do not fit into it.
    """
    boxes = sample.boxes_xyxy_px
    left = _offset(rng, min(b[0] for b in boxes), max(b[2] for b in boxes), crop_width, sample.width)
    top = _offset(rng, min(b[1] for b in boxes), max(b[3] for b in boxes), crop_height, sample.height)
    if left is None or top is None:
        return None
    window = (left, top, left + crop_width, top + crop_height)
    cut = dataclasses.replace(
        sample, key=f"{sample.key}-{suffix}", image=sample.image.crop(window), width=crop_width, height=crop_height,
        boxes_xyxy_px=tuple((b[0] - left, b[1] - top, b[2] - left, b[3] - top) for b in boxes),
        meta={**sample.meta, "crop_xyxy_px": list(window)})
    return cut if out_size is None else resize(cut, *out_size)


def resize(sample: Sample, width: int, height: int) -> Sample:
    """Return ``sample`` with its image resized to ``width`` x ``height`` pixels and its boxes scaled with it."""
    if (width, height) == (sample.width, sample.height):
        return sample
    # Multiplying first keeps an edge that lies on the border exactly on the border.
    boxes = tuple((b[0] * width / sample.width, b[1] * height / sample.height,
                   b[2] * width / sample.width, b[3] * height / sample.height) for b in sample.boxes_xyxy_px)
    image = sample.image.resize((width, height), Image.Resampling.LANCZOS)
    return dataclasses.replace(sample, image=image, width=width, height=height, boxes_xyxy_px=boxes)


def _offset(rng: random.Random, low: float, high: float, window: int, extent: int) -> int | None:
    """Start of a window of ``window`` pixels inside 0..extent that covers low..high, or None."""
    first, last = max(0, math.ceil(high - window)), min(math.floor(low), extent - window)
    return rng.randint(first, last) if first <= last else None
