"""Name the ways in which a model family writes coordinates, and the frame that goes with each.

======================  ==========  ==================================================================================
box format              family      text of a box, and of a point
======================  ==========  ==================================================================================
json_relative_1000      Qwen3-VL    ``{"bbox_2d": [x0, y0, x1, y1]}``, ``{"point_2d": [x, y]}``, 0..1000 of the image
json_resized_px         Qwen2.5-VL  the same, in pixels of the image the processor resized
tokens_relative_1000    Qwen2-VL    ``<|box_start|>(x0,y0),(x1,y1)<|box_end|>``, ``<|box_start|>(x,y)<|box_end|>``,
                                    0..1000
======================  ==========  ==================================================================================
"""

from __future__ import annotations

from megavg.protocols.plugin import nearest
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Frame

TOKENS = "tokens_relative_1000"
"""The one format that writes coordinates between tokens; the others write JSON."""
FRAME_KIND = {
    "json_relative_1000": RELATIVE_1000,
    "json_resized_px": RESIZED_PX,
    TOKENS: RELATIVE_1000,
}
BOX_FORMATS = tuple(FRAME_KIND)


def check_format(box_format: str) -> None:
    """Raise ValueError for a box format that does not exist, with the nearest name."""
    if box_format not in FRAME_KIND:
        raise ValueError(f"box format {box_format!r} does not exist{nearest(box_format, BOX_FORMATS)}")


def check_frame_kind(frame: Frame, box_format: str) -> None:
    """Raise ValueError for an unknown format or a frame of another family: every box would be silently wrong."""
    check_format(box_format)
    if frame.kind != FRAME_KIND[box_format]:
        raise ValueError(f"box format {box_format!r} is written in the frame {FRAME_KIND[box_format]!r}, got a frame "
                         f"of kind {frame.kind!r}; make the frame with FRAME_KIND[box_format]")
