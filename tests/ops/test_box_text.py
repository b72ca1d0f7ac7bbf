"""Box texts: the way there and back, what is read out of free text, and hostile answers in linear time."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.ops.box_text import (
    BOX_FORMATS, FRAME_KIND, MAX_BOXES, ParsedBoxes, format_boxes, parse_boxes, strict_format,
)
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Frame
from tests.rewards.slow_reader import has_box, has_form

JSON, PIXELS, TOKENS = BOX_FORMATS
UNIT = Frame(RELATIVE_1000, 1000, 1000, 1000, 1000)  # one original pixel is one unit of the text
RESIZED = Frame(RESIZED_PX, 1280, 800, 644, 392)


def read(text: str, box_format: str = JSON):
    return parse_boxes(text, UNIT, box_format)


@st.composite
def frames_and_boxes(draw):
    box_format = draw(st.sampled_from(BOX_FORMATS))
    width, height, resized_width, resized_height = (draw(st.integers(28, 3000)) for _ in range(4))
    frame = Frame(FRAME_KIND[box_format], width, height, resized_width, resized_height)
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        xs = sorted(draw(st.floats(0, width)) for _ in range(2))
        ys = sorted(draw(st.floats(0, height)) for _ in range(2))
        if xs[1] - xs[0] > 1e-3 and ys[1] - ys[0] > 1e-3:
            boxes.append((xs[0], ys[0], xs[1], ys[1]))
    return box_format, frame, boxes or [(0.0, 0.0, float(width), float(height))]


@settings(max_examples=400, deadline=None)
@given(frames_and_boxes())
def test_a_written_box_reads_back_to_half_a_unit_of_its_frame(case):
    box_format, frame, boxes = case
    text = format_boxes(boxes, frame, box_format)
    assert strict_format(text, box_format) is None
    answer = parse_boxes(text, frame, box_format)
    assert answer.reason == "ok" and len(answer.boxes_px) == len(boxes)
    unit_px = frame.original_width / frame.extent[0], frame.original_height / frame.extent[1]
    for box, read_back in zip(boxes, answer.boxes_px):
        for axis in (0, 1):
            # A side below one unit cannot be written with two different whole numbers half a unit away.
            tolerance = 0.5 if box[axis + 2] - box[axis] >= unit_px[axis] else 1.0
            for corner in (axis, axis + 2):
                assert abs(box[corner] - read_back[corner]) <= tolerance * unit_px[axis] * (1 + 1e-6)


def test_the_texts_are_those_of_the_three_families():
    box, other = (128.0, 80.0, 640.0, 400.0), (0.0, 0.0, 1280.0, 800.0)
    relative = Frame(RELATIVE_1000, 1280, 800, 644, 392)
    assert format_boxes([box], relative, JSON) == '{"bbox_2d": [100, 100, 500, 500]}'
    assert format_boxes([box], RESIZED, PIXELS) == '{"bbox_2d": [64, 39, 322, 196]}'
    assert format_boxes([box], relative, TOKENS) == "<|box_start|>(100,100),(500,500)<|box_end|>"
    assert json.loads(format_boxes([box, other], relative, JSON)) == [
        {"bbox_2d": [100, 100, 500, 500]}, {"bbox_2d": [0, 0, 1000, 1000]}]
    assert format_boxes([box, other], relative, TOKENS) == (
        "<|box_start|>(100,100),(500,500)<|box_end|><|box_start|>(0,0),(1000,1000)<|box_end|>")


def test_pixels_of_the_resized_image_come_back_as_original_pixels():
    answer = parse_boxes('{"bbox_2d": [0, 0, 322, 196]}', RESIZED, PIXELS)
    assert answer.boxes_px == (pytest.approx((0, 0, 640, 400)),)


@pytest.mark.parametrize("boxes, message", [([], "at least one box"), ([(5, 5, 5, 9)], "x1 > x0")])
def test_writing_nothing_or_a_degenerate_box_is_an_error(boxes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        format_boxes(boxes, UNIT, JSON)


def test_a_wrong_format_or_frame_is_an_error_that_names_the_right_one():
    with pytest.raises(ValueError, match="did you mean 'json_relative_1000'"):
        parse_boxes("", UNIT, "json_relative_100")
    with pytest.raises(ValueError, match="'json_resized_px' is written in the frame 'resized_px'"):
        parse_boxes("", UNIT, PIXELS)


ONE = ((1.0, 2.0, 3.0, 4.0),)
TWO = (*ONE, (5.0, 6.0, 7.0, 8.0))


@pytest.mark.parametrize("text, boxes", [
    ('{"bbox_2d": [1, 2, 3, 4]}', ONE),
    ('{"bbox": [1,2,3,4], "label": "a [9, 9, 10, 10] b"}', ONE),
    ('{"label": "x", "score": 0.5, "scores": [0, 0, 9, 9], "bbox_2d": [1.0, 2.0, 3e0, 4.]}', ONE),
    ("[1, 2, 3, 4]", ONE),
    ("The box is: [1, 2, 3, 4], as in [7] and [8, 9].", ONE),
    ('Here:\n```json\n[{"bbox_2d": [1, 2, 3, 4]},\n {"bbox_2d": [5, 6, 7, 8]}]\n```\nDone [0, 0, 9, 9].', TWO),
    ("[[1, 2, 3, 4], [5, 6, 7, 8]]", TWO),
    ('{"objects": [{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}]}', TWO),
    ("{'bbox_2d': [1, 2, 3, 4],}", ONE),
    ('{"bbox_2d":' + " " * 60 + '[1, 2, 3, 4], "other":' + " " * 60 + "[9, 9, 10, 10]}", ONE),
    ('[{"bbox_2d": [[1, 2, 3, 4]]}, {"bbox_2d": [5, 6, 7, 8]}]', TWO),
    ('{"seen": "[9, 9, 10, 10]", "bbox": [1, 2, 3, 4]}', ONE),
    ('The bbox_2d is this, its corners (0, 1] and so on: {"bbox_2d": [1, 2, 3, 4], "label": "it\'s [("}', ONE),
    ("bbox_2d: [1, 2, 3, 4]", ONE),
    ("<think>[9, 9, 10, 10]</think><answer>[1, 2, 3, 4]</answer> [0, 0, 9, 9]", ONE),
    ("maybe [9, 9, 10, 10]</think>[1, 2, 3, 4]", ONE),
    ("<answer>[9, 9, 10, 10]</answer><answer>[1, 2, 3, 4]", ONE),
    ("[-1, -2.5, 3, 4]", ((-1.0, -2.5, 3.0, 4.0),)),
])
def test_boxes_are_found_wherever_they_stand_in_json(text, boxes):
    answer = read(text)
    assert (answer.boxes_px, answer.reason) == (boxes, "ok")
    assert len(answer.labels) == len(answer.scores) == len(boxes)


@pytest.mark.parametrize("text, boxes", [
    ("<|box_start|>(1,2),(3,4)<|box_end|>", ONE),
    ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1, 2), (3, 4)<|box_end|>"
     "<|box_start|>(5,6),(7,8)<|box_end|>.", TWO),
    ("(9,9),(10,10) <|box_start|>(1,2),(3,4)<|box_end|>", ONE),
    ("(1,2),(3,4)", ONE),
])
def test_boxes_are_found_between_box_tokens(text, boxes):
    answer = read(text, TOKENS)
    assert (answer.boxes_px, answer.reason) == (boxes, "ok")


@pytest.mark.parametrize("text, labels, scores", [
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "king"}, {"label": "queen", "bbox_2d": [5, 6, 7, 8]}]',
     ("king", "queen"), (None, None)),
    ('{"objects": [{"score": 0.5, "bbox_2d": [1, 2, 3, 4], "class": "a"}, {"bbox_2d": [5, 6, 7, 8], '
     '"confidence": 1e-1}]}', ("a", None), (0.5, 0.1)),
    ('{"label": "both", "bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}', ("both", "both"), (None, None)),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "dog", "category": "animal", "name": "Rex"}, '
     '{"name": "Tom", "bbox_2d": [5, 6, 7, 8], "class": "cat"}]', ("dog", "cat"), (None, None)),
    ('{"label": "outer", "objects": [{"bbox_2d": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8]}]}', (None, None), (None, None)),
    ('"label": "loose" {"bbox_2d": [1, 2, 3, 4]} {"bbox_2d": [5, 6, 7, 8], "label": "in"}', (None, "in"), (None, None)),
    ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'it\\'s'}, "
     "{\"bbox_2d\": [5, 6, 7, 8], \"label\": \"\\u6846 \\\"x\\\"\"}]",
     ("it's", '框 "x"'), (None, None)),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a } b ] {"}, {"bbox_2d": [5, 6, 7, 8], "label": 3, "score": "0.5"}]',
     ("a } b ] {", None), (None, None)),
    ('[{"bbox_2d": [1, 2, 3, 4], "score": 1e400}, {"bbox_2d": [5, 6, 7, 8], "score": NaN}]', (None, None),
     (None, None)),
    ("{" * 100 + '"bbox_2d": [1, 2, 3, 4], "label": "deep"' + "}" * 100
     + '{"bbox_2d": [5, 6, 7, 8], "label": "after"}', (None, "after"), (None, None)),
    ("{" * 63 + '"label": "outer", "x": ' + "{" * 40 + '"bbox_2d": [1, 2, 3, 4]' + "}" * 103
     + '{"bbox_2d": [5, 6, 7, 8], "label": "after"}', (None, "after"), (None, None)),
])
def test_labels_and_scores_are_those_of_the_box_s_own_object(text, labels, scores):
    assert read(text) == ParsedBoxes(TWO, "ok", labels, scores)


def test_token_answers_name_their_boxes_before_them():
    text = ("<|object_ref_start|>king<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
            "<|object_ref_start|>the queen<|object_ref_end|> <|box_start|>(5,6),(7,8)<|box_end|>"
            "<|box_start|>(1,2),(3,4)<|box_end|>")
    assert read(text, TOKENS) == ParsedBoxes((*TWO, *ONE), "ok", ("king", "the queen", "the queen"))


@pytest.mark.parametrize("text, reason", [
    ("", "empty answer"),
    (" \n", "empty answer"),
    ("<answer></answer>", "empty answer"),
    ("<think>[1, 2, 3, 4]", "no answer"),
    ("I see nothing", "no JSON"),
    ("{}", "no box"),
    ("[1, 2, 3, 4", "no box"),
    ('{"scores": [1, 2, 3, 4]}', "no box"),
    ("[]", "not four numbers"),
    ("[1, 2, 3]", "not four numbers"),
    ("[1, 2, 3, 4, 5, 6, 7, 8]", "not four numbers"),
    ("[[1, 2], [3, 4]]", "not four numbers"),
    ('{"bbox_2d": ["1", "2", "3", "4"]}', "not four numbers"),
    ('{"bbox_2d": [__import__("os").getpid(), 2, 3, 4]}', "not four numbers"),
    ('{"bbox_2d": [0, 0, 10**2, 1+1]}', "not four numbers"),
    ('{"bbox_2d": [١, ٢, ٣, ٤]}', "not four numbers"),
    ('{"bbox_2d": [0, 0, NaN, 5]}', "not finite"),
    ('{"bbox_2d": [-Infinity, 0, 5, 5]}', "not finite"),
    ("[0, 0, 1e400, 5]", "huge number"),
    ("[0, 0, 5, " + "9" * 10_000 + "]", "huge number"),
    ("[3, 2, 1, 4]", "degenerate box"),
    ("[0, 0, 0, 0]", "degenerate box"),
    ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 5, 5, 5]}]', "degenerate box"),
    ("[" + "[1, 2, 3, 4], " * (MAX_BOXES + 1) + "]", "too many boxes"),
    *((text, "not four numbers") for text in (
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6', '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": ',
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bb', '[{"bbox_2d": [1, 2, 3, 4]},', "[1, 2, 3, 4], [5, 6",
        '{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": null}', '{"bbox_2d": [1, 2, 3, 4], "bbox_2d": "5, 6, 7, 8"}',
        '{"bbox_2d": "[1, 2, 3, 4]"}', '{"bbox_2d": {"x": 1}, "bbox": [1, 2, 3, 4]}', "bbox_2d: [1, 2, 3, 4], bbox: [5",
        '{"label": "bbox_2d": null, "x": [1, 2, 3, 4]}', '{"bbox_2d": [[1, 2, 3, 4], 5]}',
        "{'bbox_2d': [1, 2, 3, 4]}, {'bbox' : none}", '{"bbox_2d": [[[1, 2, 3, 4]]]}')),
])
def test_unreadable_json_answers_give_no_box_and_a_reason(text, reason):
    assert (read(text).boxes_px, read(text).reason) == ((), reason)
    assert strict_format(text, JSON) is not None


@pytest.mark.parametrize("text, reason", [
    ("", "empty answer"),
    ('{"bbox_2d": [1, 2, 3, 4]}', "no box"),
    ("<|box_start|>(1,2,3),(4)<|box_end|>", "not four numbers"),
    ("<|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6)", "not four numbers"),
    ("(a,b),(c,d)", "not four numbers"),
    ("<|box_start|>(1,2),(3,4)", "not four numbers"),
    ("(1,2),(3,4) (5,6),(7", "not four numbers"),
    ("<|box_start|>(1,2),(3,4)<|box_end|><|object_ref_start|>queen", "not four numbers"),
    ("<|box_start|>(3,4),(1,2)<|box_end|>", "degenerate box"),
    ("<|box_start|>(nan,0),(1,2)<|box_end|>", "not finite"),
])
def test_unreadable_token_answers_give_no_box_and_a_reason(text, reason):
    answer = read(text, TOKENS)
    assert (answer.boxes_px, answer.reason) == ((), reason)
    assert strict_format(text, TOKENS) is not None


@pytest.mark.parametrize("text", [
    '{"bbox_2d": [1, 2, 3, 4]}',
    ' {"bbox_2d":[1,2.5,3,4],"label":"a \\" b"}\n',
    '[{"label": "x", "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]',
    '```json\n{"bbox_2d": [1, 2, 3, 4]}\n```',
    '<think>left of it</think>\n<answer>\n```json\n{"bbox_2d": [1, 2, 3, 4]}\n```\n</answer>',
])
def test_well_formed_answers_pass_the_strict_check(text):
    assert strict_format(text, JSON) is None
    assert strict_format(text, PIXELS) is None
    assert strict_format(text, TOKENS) is not None


@pytest.mark.parametrize("text", [
    "[1, 2, 3, 4]",
    '{"bbox": [1, 2, 3, 4]}',
    '{"bbox_2d": [1, 2, 3, 4]} there',
    '{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}',
    '{"bbox_2d": [1, 2, 3, 4],}',
    '{"bbox_2d": [01, 2, 3, 4]}',
    '{"bbox_2d"\u2028: [1, 2, 3, 4]}',
    '{"bbox_2d": [1, 2, 3, 4], "label": "\\e"}',
    '{"bbox_2d": [1, 2, 3, 4], "label": "a\nb"}',
    '<answer>{"bbox_2d": [1, 2, 3, 4]}',
    '<think></think><answer>{"bbox_2d": [1, 2, 3, 4]}</answer>',
    '<think>a</think> so <answer>{"bbox_2d": [1, 2, 3, 4]}</answer>',
    '<think>a</think><answer>{"bbox_2d": [1, 2, 3, 4]}</answer><answer>{"bbox_2d": [1, 2, 3, 4]}</answer>',
])
def test_readable_answers_in_another_form_fail_the_strict_check(text):
    assert read(text).reason == "ok"
    assert strict_format(text, JSON) is not None


def test_thinking_can_be_demanded_or_forbidden():
    plain = '{"bbox_2d": [1, 2, 3, 4]}'
    wrapped = f"<think>a</think><answer>{plain}</answer>"
    assert strict_format(plain, JSON, thinking=False) is None
    assert strict_format(plain, JSON, thinking=True) == "no <think> and <answer>"
    assert strict_format(wrapped, JSON, thinking=True) is None
    assert strict_format(wrapped, JSON, thinking=False) == "text around the boxes"


SIZE = 300_000
BOMBS = {
    "open brackets": "[" * SIZE,
    "open braces": "{" * SIZE,
    "nested lists": "[" * (SIZE // 2) + "]" * (SIZE // 2),
    "nested objects": '{"bbox_2d":' * (SIZE // 11),
    "empty lists": "[]" * (SIZE // 2),
    "keys": '"bbox_2d": ' * (SIZE // 11),
    "lists under another key": '"a": [1],' * (SIZE // 9),
    "quotes": '["' * (SIZE // 2),
    "escapes": '{"label": "' + '\\"' * (SIZE // 2),
    "digits": "[0, 0, 5, " + "9" * SIZE + "]",
    "digits without an end": "[0, 0, 5, " + "9" * SIZE + "x]",
    "exponent": "[0, 0, 5, 1e" + "9" * SIZE + "]",
    "commas": "[" + "," * SIZE + "]",
    "blanks": "[" + " " * SIZE + ",,,]",
    "blanks in an object": "{" + " " * SIZE + "[0",
    "new lines in a fence": "```" + "\n" * SIZE + "x[```",
    "parentheses": "(" * SIZE,
    "half corners": "(1,2)," * (SIZE // 6),
    "blanks after a corner": "(1,2)" + " " * SIZE,
    "box tokens": "<|box_start|>" * (SIZE // 13),
    "blanks after a box token": "<|box_start|>" + " " * SIZE,
    "answers": "<answer>" * (SIZE // 8) + "[",
    "thoughts": "<think></think><answer>" * (SIZE // 30) + "</answer>x" * (SIZE // 30),
    "labels": '{"label": "' * (SIZE // 11),
    "labels under labels": '{"label": "x", ' * (SIZE // 15),
    "braces in turn": '{"label": "x"}' + "{}" * (SIZE // 2),
    "braces and brackets": '{"label": "x"}' + "{[" * (SIZE // 2),
    "references": "<|object_ref_start|>" * (SIZE // 20),
    "references without an end": "<|object_ref_start|>x" * (SIZE // 21),
    "list of objects": "[" + '{"bbox_2d": [1, 2, 3, 4]},' * 900 + " " * SIZE + "]",
    "strings under keys": '"a":"b\\"' * (SIZE // 8) + "[1, 2, 3, 4",
    "strings in turn": "{'a':\"" * (SIZE // 6) + "[1, 2, 3, 4",
    "lists of lists": '{"bbox_2d": [' + "[1, 2, 3, 4]," * (SIZE // 13),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_text_is_read_in_linear_time(name):
    # A quadratic reader needs hours for so many characters; the bound leaves room for a slow machine.
    start = time.process_time()
    for box_format in BOX_FORMATS:
        frame = Frame(FRAME_KIND[box_format], 1000, 1000, 1000, 1000)
        answer = parse_boxes(BOMBS[name], frame, box_format)
        assert bool(answer.boxes_px) == (name == "list of objects" and box_format != TOKENS)
        assert answer.reason
        for thinking in (None, True, False):
            assert strict_format(BOMBS[name], box_format, thinking) is not None
    assert time.process_time() - start < 20


PIECES = [
    *"[]{}(),:\"'\\ \n`-.e07", ", ", "```json", "bbox_2d", '"bbox_2d": ', '"bbox": [', '"label": "x"', "<|box_start|>",
    "<|box_end|>", "<think>", "</think>", "<answer>", "</answer>", "NaN", "-Infinity", "1e9999", "12", "500", "999.5",
    "null", "true", "é", "框", "\x00", "\u202e", "\ud800", "__import__('os')",
]


def fuzzed(rng: random.Random) -> str:
    """Soup of pieces, or a good answer with a few characters or pieces changed."""
    if rng.random() < 0.5:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 40)))
    text = format_boxes([(10, 20, 30, 40)] * rng.randint(1, 2), UNIT, rng.choice([JSON, TOKENS]))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.randint(0, 6):]
    return text


def test_fuzzed_answers_never_crash_and_give_boxes_only_where_a_slow_reader_finds_them():
    rng = random.Random(20260801)
    outcomes = {"boxes": 0, "none": 0}
    for _ in range(20_000):
        text = fuzzed(rng)
        for box_format in (JSON, TOKENS):
            answer = read(text, box_format)
            assert answer.reason and (answer.reason == "ok") == bool(answer.boxes_px)
            assert not answer.boxes_px or has_box(text, box_format), text
            if strict_format(text, box_format) is None:
                assert answer.boxes_px and has_form(text, box_format, "rec"), text
            outcomes["boxes" if answer.boxes_px else "none"] += 1
    assert min(outcomes.values()) > 1000


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_read_without_an_error(text):
    for box_format in (JSON, TOKENS):
        answer = read(text, box_format)
        assert answer.reason and (answer.reason == "ok") == bool(answer.boxes_px)
