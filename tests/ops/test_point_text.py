"""Point texts: written points lie in their boxes, and points are read in all the ways in which models say them."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.ops.box_formats import BOX_FORMATS, FRAME_KIND
from megavg.ops.boxes import contains
from megavg.ops.point_text import ParsedPoints, format_point, parse_points
from megavg.ops.strict_text import strict_format
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Frame

JSON, PIXELS, TOKENS = BOX_FORMATS
UNIT = Frame(RELATIVE_1000, 1000, 1000, 1000, 1000)  # one original pixel is one unit of the text


def read(text: str, box_format: str = JSON) -> ParsedPoints:
    return parse_points(text, UNIT, box_format)


def test_the_texts_are_those_of_the_three_families():
    box, relative = (128.0, 80.0, 640.0, 400.0), Frame(RELATIVE_1000, 1280, 800, 644, 392)
    assert format_point(box, relative, JSON) == '{"point_2d": [300, 300]}'
    assert format_point(box, Frame(RESIZED_PX, 1280, 800, 644, 392), PIXELS) == '{"point_2d": [193, 118]}'
    assert format_point(box, relative, TOKENS) == "<|box_start|>(300,300)<|box_end|>"
    # No whole number lies in a box of a third of a unit: decimals do.
    assert format_point((100.26, 0.0, 100.56, 10.0), UNIT, JSON) == '{"point_2d": [100.4, 5.0]}'
    with pytest.raises(ValueError, match="x1 > x0"):
        format_point((5, 5, 5, 9), UNIT, JSON)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BOX_FORMATS), st.tuples(*[st.integers(28, 3000)] * 4), st.data())
def test_a_written_point_reads_back_inside_its_box(box_format, sizes, data):
    frame = Frame(FRAME_KIND[box_format], *sizes)
    x, y = (sorted(data.draw(st.floats(0, size)) for _ in range(2)) for size in sizes[:2])
    box = (x[0], y[0], max(x[1], x[0] + 0.01), max(y[1], y[0] + 0.01))
    text = format_point(box, frame, box_format)
    assert strict_format(text, box_format, task="point") is None
    (point,) = parse_points(text, frame, box_format).points_px
    assert contains(box, point)


@pytest.mark.parametrize("text, points", [
    ('{"point_2d": [1, 2]}', [(1, 2)]),
    ('```json\n[{"point_2d": [1, 2.5], "label": "a [3, 4]"}, {"point_2d": [3, 4]}]\n```', [(1, 2.5), (3, 4)]),
    ('{"point_2d": [1, 2], "bbox_2d": [10, 10, 20, 20]}', [(1, 2)]),
    ('{"name": "computer_use", "arguments": {"action": "click", "coordinate": [1, 2]}}', [(1, 2)]),
    ('{"points": [[1, 2], [3, 4]]}', [(1, 2), (3, 4)]),
    ("[1, 2]", [(1, 2)]),
    ("[10, 10, 20, 40]", [(15, 25)]),
    ('{"bbox_2d": [10, 10, 20, 40]}', [(15, 25)]),
    ("see [7]: it is at [1, 2].", [(1, 2)]),
    ("(1, 2)", [(1, 2)]),
    ("It (the button) is at (1, 2).", [(1, 2)]),
    ("click(1, 2)", [(1, 2)]),
    ("pyautogui.click(x=1, y = 2)", [(1, 2)]),
    ("click(start_box='(1,2)')", [(1, 2)]),
    ("[the button](1, 2)", [(1, 2)]),
    ("(10, 10), (20, 40)", [(15, 25)]),
    ("[(10, 10),(20, 40)]", [(15, 25)]),
    ("<|box_start|>(10,10),(20,40)<|box_end|>", [(15, 25)]),
    ("the middle of it (the button), (1, 2)", [(1, 2)]),
    ('{"points": [{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]}', [(1, 2), (3, 4)]),
    ("<think>(9, 9)</think><answer>(1, 2)</answer>", [(1, 2)]),
])
def test_points_are_read_as_models_say_them(text, points):
    answer = read(text)
    assert (list(answer.points_px), answer.reason) == (points, "ok")


@pytest.mark.parametrize("text, points", [
    ("<|box_start|>(1,2)<|box_end|>", [(1, 2)]),
    ("<|object_ref_start|>ok<|object_ref_end|><|box_start|>(10, 10), (20, 40)<|box_end|>", [(15, 25)]),
    ("(9,9) <|box_start|>(1,2)<|box_end|>", [(1, 2)]),
    ("(1,2)", [(1, 2)]),
    ("(10,10),(20,40)", [(15, 25)]),
])
def test_points_are_found_between_box_tokens(text, points):
    answer = read(text, TOKENS)
    assert (list(answer.points_px), answer.reason) == (points, "ok")


def test_a_point_knows_the_box_it_is_the_centre_of():
    answer = parse_points("[[0, 0, 322, 196], [64, 39]]", Frame(RESIZED_PX, 1280, 800, 644, 392), PIXELS)
    assert answer.boxes_px == (pytest.approx((0, 0, 640, 400)), None)
    assert answer.points_px[0] == pytest.approx((320, 200))


@pytest.mark.parametrize("text, reason", [
    ("", "empty answer"),
    ("<answer> </answer>", "empty answer"),
    ("<think>(1, 2)", "no answer"),
    ("in the middle", "no point"),
    ('{"size": [1, 2]}', "no point"),
    ("[1, 2, 3]", "not two numbers"),
    ("(a, b)", "not two numbers"),
    ('{"point_2d": ["1", "2"]}', "not two numbers"),
    ('{"point_2d": [1]}', "not two numbers"),
    ('{"point_2d": [١, ٢]}', "not two numbers"),
    ("[1+1, 2]", "not two numbers"),
    ("[NaN, 2]", "not finite"),
    ("click(inf, 2)", "not finite"),
    ("[1e400, 2]", "huge number"),
    ("[1, " + "9" * 100 + "]", "huge number"),
    ('{"bbox_2d": [5, 5, 5, 5]}', "degenerate box"),
    *((text, "not two numbers") for text in (
        '{"point_2d": [1, 2]}, {"point_2d": [', '{"point_2d": [1, 2]}, {"point_2d": [3', '{"point_2d": "1, 2"}',
        '[{"point_2d": [1, 2]}, {"point_2d": null}]', '{"point_2d": [1, 2], "bbox_2d": "1, 2, 3, 4"}',
        '{"point_2d": [1, 2], "bbox_2d": [1, 2, 3]}', '{"point_2d": [x=1, 2]}',
        '{"bbox_2d": [[10, 10], [20, 40]]}', "(10,10),(20,4", "[1, 2], [3,", '[{"point_2d": [1, 2]},')),
    ("[1, 2]" * 1001, "too many points"),
    ("(1, 2)" * 1001, "too many points"),
])
def test_unreadable_answers_give_no_point_and_a_reason(text, reason):
    assert read(text) == ParsedPoints((), reason)
    assert strict_format(text, JSON, task="point") is not None


@pytest.mark.parametrize("text, reason", [
    ("", "empty answer"),
    ("<|box_start|><|box_end|>", "not two numbers"),
    ("<|box_start|>(1,2)", "not two numbers"),
    ("<|box_start|>(1,2),(3,", "not two numbers"),
    ("(1,2),(3,", "not two numbers"),
    ("<|box_start|>(1,2,3)<|box_end|>", "not two numbers"),
    ("<|box_start|>(1,2)<|box_end|><|box_start|>", "not two numbers"),
    ("(1,2)" * 1001, "too many points"),
    ("[1, 2]", "no point"),
])
def test_unreadable_token_answers_give_no_point_and_a_reason(text, reason):
    assert read(text, TOKENS) == ParsedPoints((), reason)


def test_a_frame_of_another_family_is_an_error():
    with pytest.raises(ValueError, match=re.escape("'json_resized_px' is written in the frame 'resized_px'")):
        parse_points("", UNIT, PIXELS)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("()[]{}<|box_start|>,:\"' \n12.eE+-xyclickpoint_2d=\x00\ud800")))
def test_any_text_is_read_without_an_error(text):
    for box_format in (JSON, TOKENS):
        answer = read(text, box_format)
        assert (answer.reason == "ok") == bool(answer.points_px)


@pytest.mark.parametrize("text", [
    "(" * 300_000, "((1,2" * 60_000, "(1,2" + " " * 300_000, "click(" * 50_000, "(" + "9" * 300_000 + ")",
    "[(" * 150_000,
    "<|box_start|>" * 25_000, "(1,2)" + " " * 300_000 + "," + " " * 300_000, "(a,b)," * 50_000])
def test_hostile_text_is_read_in_linear_time(text):
    start = time.process_time()
    for box_format in (JSON, TOKENS):
        answer = read(text, box_format)
        assert answer.reason and len(answer.points_px) <= 1
    assert time.process_time() - start < 10
