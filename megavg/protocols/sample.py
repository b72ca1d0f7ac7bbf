"""What the data room hands out, what the model answered, and what a reward says: standard library only.

Boxes are ``(x0, y0, x1, y1)`` with ``x1`` and ``y1`` exclusive, as continuous coordinates: a box that covers a
whole W x H image is ``(0, 0, W, H)``. Every name that holds boxes ends in its frame: ``_px`` is pixels of the ORIGINAL
image, wherever the box came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

Box = tuple[float, float, float, float]

RELATIVE_1000 = "relative_1000"
RESIZED_PX = "resized_px"

TASKS = ("rec", "point", "detection", "classification")
"""What a sample asks for: the box(es) an expression names, a point inside of one, every object of some classes with
its class, or the name of a class."""


@dataclass(frozen=True)
class Sample:
    """One image, what is asked about it, and the truth.

    Attributes:
        key: unique inside its shard set; errors and metrics name it.
        shard: path of the tar file it was read from ("" when made in memory).
        image: ``PIL.Image.Image`` in mode RGB, at its original size.
        width, height: original size in pixels.
        expression: what to find, such as "the red circle"; for detection and classification the classes to choose
            from, such as "king, queen".
        boxes_xyxy_px: the true boxes in original pixels: one or more, for detection none or more, for classification
            none.
        meta: everything else the record carried (source, kind, flags), untouched.
        task: one of ``TASKS``.
        labels: for detection the class of each box, for classification the name or names that are right (the first is
            what supervised fine-tuning learns); empty otherwise.
    """

    key: str
    shard: str
    image: Any
    width: int
    height: int
    expression: str
    boxes_xyxy_px: tuple[Box, ...]
    meta: dict = field(default_factory=dict)
    task: str = "rec"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The coordinates a model family writes in its answers, and the real resize of one image.

    ``kind`` is ``relative_1000`` (Qwen2-VL, Qwen3-VL: 0..1000 of the image) or ``resized_px`` (Qwen2.5-VL: pixels of
    the image as resized by the processor). Sizes are in pixels.
    """

    kind: str
    original_width: int
    original_height: int
    resized_width: int
    resized_height: int

    def __post_init__(self):
        if self.kind not in (RELATIVE_1000, RESIZED_PX):
            raise ValueError(f"unknown frame kind {self.kind!r}: expected {RELATIVE_1000!r} or {RESIZED_PX!r}")
        if min(self.original_width, self.original_height, self.resized_width, self.resized_height) < 1:
            raise ValueError(f"a frame needs sizes of at least one pixel, got {self}")

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the whole image in this frame's own unit."""
        if self.kind == RELATIVE_1000:
            return 1000.0, 1000.0
        return float(self.resized_width), float(self.resized_height)

    def from_px(self, box_px: Box) -> Box:
        """Original pixels -> this frame (not rounded)."""
        sx, sy = self.extent[0] / self.original_width, self.extent[1] / self.original_height
        return box_px[0] * sx, box_px[1] * sy, box_px[2] * sx, box_px[3] * sy

    def to_px(self, box: Box) -> Box:
        """This frame -> original pixels."""
        sx, sy = self.original_width / self.extent[0], self.original_height / self.extent[1]
        return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


@dataclass(frozen=True)
class Completion:
    """A model's answer to one sample, as a reward or the evaluation sees it.

    Attributes:
        text: the decoded answer without its end token.
        box_format: name of the family's box format (``megavg.ops.box_text.BOX_FORMATS``).
        frame: the frame of coordinates the text is written in.
        num_tokens: answer tokens, the end token included.
        truncated: True when the answer hit the length limit before an end token.
    """

    text: str
    box_format: str
    frame: Frame
    num_tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class RewardResult:
    """A score and the reason for it, in a few words that can be counted ("ok", "no JSON", "degenerate box")."""

    score: float
    reason: str


Reward = Callable[..., RewardResult]
"""A reward is a plain documented function ``(completion: Completion, sample: Sample, **options) -> RewardResult``."""
