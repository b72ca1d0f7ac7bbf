"""Drawn tiles and panels: colours where the boxes are, text that stays inside, odd input that does not break them."""

from __future__ import annotations

import math

import pytest
from PIL import Image, ImageChops

from megavg.evaluation.draw import PREDICTED_COLOR, TRUE_COLOR, draw_boxes, panel

GREY = (128, 128, 128)


def picture(width: int = 96, height: int = 96) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def extent_of(image: Image.Image, color) -> tuple[int, int, int, int] | None:
    """Smallest box around all pixels of exactly this colour."""
    different = ImageChops.difference(image, Image.new("RGB", image.size, color)).convert("RGB").split()
    most = ImageChops.lighter(ImageChops.lighter(*different[:2]), different[2])
    return most.point(lambda value: 255 if value == 0 else 0).getbbox()


@pytest.mark.parametrize("size", [(96, 96), (400, 300), (300, 400), (1920, 1080)])
def test_boxes_are_drawn_where_they_are(size):
    width, height = size
    truth = (width * 0.25, height * 0.25, width * 0.75, height * 0.75)
    predicted = (width * 0.125, height * 0.375, width * 0.5, height * 0.875)
    tile = draw_boxes(picture(*size), [truth], [predicted], "the red circle")
    scale = 224 / max(size)
    left = (224 - width * scale) / 2
    assert tile.width == 224
    for box, color in ((truth, TRUE_COLOR), (predicted, PREDICTED_COLOR)):
        expected = [box[0] * scale + left, box[1] * scale, box[2] * scale + left, box[3] * scale]
        assert extent_of(tile, color) == pytest.approx(expected, abs=3)


def test_true_lines_are_whole_and_predicted_ones_dashed():
    box = (24, 24, 72, 72)
    row = 56  # the upper side: 24 pixels enlarged by 224 / 96
    shares = []
    for truth, predicted, color in (([box], [], TRUE_COLOR), ([], [box], PREDICTED_COLOR)):
        tile = draw_boxes(picture(), truth, predicted, "")
        colored = sum(tile.getpixel((x, row)) == color for x in range(60, 164))
        shares.append(colored / 104)
    assert shares[0] == 1 and 0.4 < shares[1] < 0.9


def test_a_perfect_prediction_shows_both_colours():
    tile = draw_boxes(picture(), [(24, 24, 72, 72)], [(24, 24, 72, 72)], "")
    assert extent_of(tile, TRUE_COLOR) and extent_of(tile, PREDICTED_COLOR)


@pytest.mark.parametrize("predicted", [
    [], [(200, 200, 300, 300)], [(-1e6, -1e6, 1e6, 1e6)], [(math.nan, 0, 5, 5)], [(5, 5, 5, 5)], [(40, 40, 40.01, 90)],
    [(95.9, 95.9, 99, 99)], [(0, 0, 1, 1)] * 200,
])
def test_odd_predictions_are_drawn_without_an_error_and_the_input_stays(predicted):
    image = picture()
    tile = draw_boxes(image, [(24, 24, 72, 72)], predicted, "x")
    assert extent_of(tile, TRUE_COLOR) is not None
    assert image.tobytes() == picture().tobytes()


def test_other_modes_and_extreme_shapes_are_drawn():
    for image in (Image.new("L", (96, 96)), Image.new("RGBA", (1, 2000)), Image.new("P", (2000, 1))):
        assert draw_boxes(image, [(0, 0, 1, 1)], [], "x", scale_to=160).width == 160


def test_captions_wrap_stay_inside_and_end_after_three_lines():
    heights = {text: draw_boxes(picture(), [], [], text).height
               for text in ("", "short", "several words " * 4, "several words " * 400, "x" * 5000)}
    assert heights[""] <= heights["short"] < heights["several words " * 4] <= heights["several words " * 400]
    assert heights["x" * 5000] == heights["several words " * 400] < 224 + 100
    tile = draw_boxes(picture(), [], [], "W" * 300)
    # The last column right of the text must stay paper but for what one glyph's edge may take.
    ink = ImageChops.invert(tile.crop((0, 226, 224, tile.height)).convert("L")).getbbox()
    assert ink is not None and ink[2] <= 224 and ink[3] <= tile.height - 226


def test_a_panel_holds_every_tile_a_title_and_a_legend():
    tiles = [Image.new("RGB", (100 + n, 120), (n, 0, 77)) for n in range(5)]
    sheet = panel(tiles, 3, "held-out scenes")
    for n, tile in enumerate(tiles):
        left, top, right, bottom = extent_of(sheet, (n, 0, 77))
        assert (right - left, bottom - top) == tile.size
    legend = sheet.crop((0, 0, sheet.width, extent_of(sheet, (0, 0, 77))[1]))
    assert extent_of(legend, TRUE_COLOR) and extent_of(legend, PREDICTED_COLOR)
    assert panel(tiles, 3, "a title of many words " * 5).height > sheet.height
    # One narrow tile still leaves room for the whole legend.
    assert panel([Image.new("RGB", (10, 10))], 8, "t").width > 220


@pytest.mark.parametrize("tiles, columns", [([], 3), ([Image.new("RGB", (5, 5))], 0)])
def test_a_panel_of_nothing_is_an_error(tiles, columns):
    with pytest.raises(ValueError, match="at least one tile and one column"):
        panel(tiles, columns, "t")
