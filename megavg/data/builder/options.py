"""How a shard set is made: sizes, picture format, windows cut out of pictures, and what happens to bad samples."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import PIL

from megavg.data.crops import crop_around, resize
from megavg.data.readers.base import Draft
from megavg.data.sample import SampleError
from megavg.data.writer import FORMAT_VERSION, IMAGE_FORMATS, check_names
from megavg.protocols.sample import Sample

KEEP = "keep"
# These say what to do with bad drafts, not what a good one becomes: a build may be continued under other values.
_NOT_IN_THE_BYTES = ("on_error", "max_skipped")


@dataclass(frozen=True)
class BuildOptions:
    """How ``build_shards`` turns drafts into shards.

    Attributes:
        prefix: shards are named ``<prefix>-000000.tar``, ...
        samples_per_shard: a shard holds the samples of so many numbers, less what is left out.
        image_format: "keep" stores the source's own bytes, with whatever metadata (EXIF, ICC profile, comments) they
            carry, after a full decode; pictures that were changed, or drawn, become PNG. "png", "webp" (bit-equal
            pixels) and "jpg" (quality 95) encode anew and keep the pixels alone.
        crop: (width, height) in pixels of random windows that hold all boxes of a sample; None cuts nothing.
        crops_per_sample: windows per sample, with ``crop``.
        resize: (width, height) in pixels that pictures, or windows, are resized to.
        seed: of the windows.
        limit: stop after so many samples; those that are then left out as bad are not replaced.
        on_error: "raise" stops at the first bad sample; "skip" leaves it out and lists it.
        max_skipped: number of bad samples that "skip" still accepts.
        on_duplicate: what happens to a sample whose picture has the same bytes and whose question and answer are the
            same as those of an earlier one: "keep" and report, "skip" it, or "raise".
    """

    prefix: str = "shard"
    samples_per_shard: int = 256
    image_format: str = KEEP
    crop: tuple[int, int] | None = None
    crops_per_sample: int = 1
    resize: tuple[int, int] | None = None
    seed: int = 0
    limit: int | None = None
    on_error: str = "raise"
    max_skipped: int = 100
    on_duplicate: str = "keep"

    def __post_init__(self):
        check_names(self.prefix, self.samples_per_shard)
        for name, allowed in (("image_format", (KEEP, *IMAGE_FORMATS)), ("on_error", ("raise", "skip")),
                              ("on_duplicate", ("keep", "skip", "raise"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name, least in (("crops_per_sample", 1), ("max_skipped", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if self.crops_per_sample > 1 and not self.crop:
            raise ValueError(f"crops_per_sample={self.crops_per_sample} needs crop=(width, height)")

    def identity(self) -> dict[str, Any]:
        """What the bytes of the shards depend on, beside the drafts, as plain JSON."""
        options = {name: list(value) if isinstance(value, tuple) else value
                   for name, value in dataclasses.asdict(self).items() if name not in _NOT_IN_THE_BYTES}
        # Another Pillow may compress the same pixels to other bytes.
        return options | {"format_version": FORMAT_VERSION, "pillow": PIL.__version__}

    def reshape(self, sample: Sample, turn: int) -> Sample:
        """Window number ``turn`` of ``sample``, resized; the sample itself where nothing is to be changed.

        Raises:
            SampleError: the window does not fit the picture and its boxes.
        """
        if self.crop is None:
            return resize(sample, *self.resize) if self.resize else sample
        cut = self._cut(sample, turn, self.resize)
        if cut is None:
            raise SampleError(sample.shard, sample.key, "box outside image", _unfit(self.crop))
        return cut

    def unit_key(self, key: str, turn: int) -> str:
        """The key that ``reshape`` gives to window ``turn`` of the sample ``key``."""
        return f"{key}-crop{turn}" if self.crop else key

    def why_unfit(self, draft: Draft) -> str | None:
        """Why no window of ``crop`` fits ``draft``, or None; a draft with a fault counts as fit, its shard tells it.

        Raises:
            ValueError: the draft has no box that a window could be cut around.
        """
        if self.crop is None:
            return None
        try:
            sample = _outlined(draft)
        except SampleError:
            return None
        if not sample.boxes_xyxy_px:
            raise ValueError(f"{draft.where}: sample {draft.key!r} of task {sample.task!r} has no box to cut a window "
                             "around; leave crop away, or use resize")
        return _unfit(self.crop) if self._cut(sample, 0, None) is None else None

    def _cut(self, sample: Sample, turn: int, out_size: tuple[int, int] | None) -> Sample | None:
        rng = random.Random(f"make_shards/{self.seed}/{sample.key}/{turn}")
        return crop_around(sample, rng, *self.crop, out_size=out_size, suffix=f"crop{turn}")


def _unfit(crop: tuple[int, int]) -> str:
    return f"no window of {crop[0]} x {crop[1]} pixels lies in the picture and holds all boxes"


class _Outline:
    """Stands for a picture where only its size counts, so that planning decodes nothing."""

    def crop(self, window: tuple[int, int, int, int]) -> _Outline:
        return self


def _outlined(draft: Draft) -> Sample:
    """The sample of ``draft`` without pixels; drawn samples, which state nothing beforehand, are drawn."""
    if draft.image is None:
        return dataclasses.replace(draft.load(), image=_Outline())
    return dataclasses.replace(draft.outline(), image=_Outline(), shard=draft.where)
