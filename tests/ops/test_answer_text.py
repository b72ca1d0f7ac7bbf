"""Answers of every task: what SFT learns reads back, classes are compared by name, and forms are told apart."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.data.sample import SampleError, check_labels
from megavg.ops.answer_text import answer_part, class_name, format_answer, normal_name, says_none
from megavg.ops.box_formats import BOX_FORMATS, FRAME_KIND
from megavg.ops.box_text import parse_boxes, strict_format
from megavg.ops.boxes import contains
from megavg.ops.point_text import parse_points
from megavg.protocols.sample import RESIZED_PX, TASKS, Frame, Sample

JSON, PIXELS, TOKENS = BOX_FORMATS
KING, QUEEN = (100.0, 50.0, 300.0, 150.0), (400.0, 200.0, 480.0, 264.0)


def make_sample(task: str, boxes=(), labels=(), width: int = 640, height: int = 480) -> Sample:
    return Sample("k0", "a.tar", None, width, height, "all cards", tuple(boxes), {}, task, tuple(labels))


def make_frame(box_format: str, *sizes: int) -> Frame:
    return Frame(FRAME_KIND[box_format], *(sizes or (640, 480, 644, 476)))


def test_the_texts_of_every_task():
    def text(box_format: str, task: str, boxes=(KING, QUEEN), labels=("king", "queen")) -> str:
        return format_answer(make_sample(task, boxes, labels), make_frame(box_format, 640, 480, 640, 480), box_format)

    king, queen = [100, 50, 300, 150], [400, 200, 480, 264]
    assert json.loads(text(PIXELS, "rec")) == [{"bbox_2d": king}, {"bbox_2d": queen}]
    assert text(PIXELS, "point") == '{"point_2d": [200, 100]}'
    assert text(PIXELS, "detection") == \
        f'[{{"bbox_2d": {king}, "label": "king"}}, {{"bbox_2d": {queen}, "label": "queen"}}]'
    assert text(PIXELS, "detection", [KING], ["框"]) == f'[{{"bbox_2d": {king}, "label": "框"}}]'
    assert text(TOKENS, "point") == "<|box_start|>(313,208)<|box_end|>"
    assert text(TOKENS, "detection", [KING], ["king"]) == \
        "<|object_ref_start|>king<|object_ref_end|><|box_start|>(156,104),(469,313)<|box_end|>"
    for box_format in BOX_FORMATS:
        assert text(box_format, "detection", [], []) == "None"
        assert text(box_format, "classification", [], ["King", "monarch"]) == "King"


@st.composite
def samples(draw):
    """A sample of any task with its frame, as a shard and a processor would give them."""
    box_format, task = draw(st.sampled_from(BOX_FORMATS)), draw(st.sampled_from(TASKS))
    width, height, resized_width, resized_height = (draw(st.integers(28, 4000)) for _ in range(4))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        x, y = (sorted(draw(st.floats(0, size)) for _ in range(2)) for size in (width, height))
        if x[1] - x[0] > 1e-3 and y[1] - y[0] > 1e-3:
            boxes.append((x[0], y[0], x[1], y[1]))
    boxes = boxes or [(0.0, 0.0, float(width), float(height))]
    if task == "detection" and draw(st.booleans()):
        boxes = boxes[1:]
    names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
        lambda name: normal_name(name) and "<" not in name and name.strip()[0] not in "{[`")
    labels = {"detection": [draw(names) for _ in boxes], "classification": [draw(names)]}.get(task, [])
    sample = make_sample(task, [] if task == "classification" else boxes, labels, width, height)
    return sample, make_frame(box_format, width, height, resized_width, resized_height), box_format


@settings(max_examples=400, deadline=None)
@given(samples(), st.booleans())
def test_written_answers_read_back_to_half_a_unit_and_have_the_strict_form(case, thinking):
    sample, frame, box_format = case
    text = format_answer(sample, frame, box_format)
    if thinking:
        text = f"<think>so</think>\n<answer>{text}</answer>"
    assert strict_format(text, box_format, thinking, sample.task) is None
    if sample.task == "classification":
        assert class_name(text) == normal_name(sample.labels[0])
        return
    if sample.task == "point":
        (point,) = parse_points(text, frame, box_format).points_px
        assert contains(sample.boxes_xyxy_px[0], point)
        return
    answer = parse_boxes(text, frame, box_format)
    assert len(answer.boxes_px) == len(sample.boxes_xyxy_px)
    assert says_none(text) == (not answer.boxes_px)
    if sample.task == "detection":
        assert answer.labels == sample.labels
    assert_half_a_unit(sample, frame, answer.boxes_px)


def assert_half_a_unit(sample: Sample, frame: Frame, boxes_px) -> None:
    """Corners within half a unit of the frame; in pixels of the resized image that is the documented bound."""
    unit_px = frame.original_width / frame.extent[0], frame.original_height / frame.extent[1]
    resized = frame.resized_width / frame.original_width, frame.resized_height / frame.original_height
    for box, read_back in zip(sample.boxes_xyxy_px, boxes_px):
        for axis in (0, 1):
            if box[axis + 2] - box[axis] < unit_px[axis]:
                continue  # a side below one unit is written as one
            side = (frame.resized_width, frame.resized_height)[axis]
            bound = 0.5 if frame.kind == RESIZED_PX else side / 2000
            for corner in (axis, axis + 2):
                assert abs(box[corner] - read_back[corner]) * resized[axis] <= bound * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("task, boxes, labels, message", [
    ("rec", [], [], "at least one box"),
    ("point", [], [], "needs a true box"),
    ("point", [(5, 5, 5, 9)], [], "x1 > x0"),
    ("detection", [KING], [], "one label for each box, got 0 for 1 boxes"),
    ("detection", [KING], [" "], "expected a label of 1 to"),
    ("detection", [KING], ["x" * 300], "expected a label of 1 to"),
    ("classification", [], [], "the name of its class"),
    ("classification", [], [" "], "the name of its class"),
    ("classification", [], ["[king]"], "could not be read back"),
    ("classification", [], ["x" * 300], "could not be read back"),
    ("caption", [KING], [], "task 'caption' does not exist"),
])
def test_what_cannot_be_written_is_an_error_that_names_the_sample(task, boxes, labels, message):
    with pytest.raises(ValueError, match="a.tar: sample 'k0'.*" + message):
        format_answer(make_sample(task, boxes, labels), make_frame(JSON), JSON)


@pytest.mark.parametrize("label", ["king", "x" * 200, "框" * 200, 'the "king"', "'" + "x" * 200 + "'."])
def test_a_label_that_a_shard_takes_can_be_answered(label):
    check_labels([label], "classification", 0, "a.tar", "k0")
    check_labels([label], "detection", 1, "a.tar", "k0")
    assert class_name(format_answer(make_sample("classification", (), [label]), make_frame(JSON), JSON)) == \
        normal_name(label) != ""
    if len(label) <= 200:
        text = format_answer(make_sample("detection", [KING], [label]), make_frame(JSON), JSON)
        assert parse_boxes(text, make_frame(JSON), JSON).labels == (label,)


@pytest.mark.parametrize("label", ["x" * 201, "ß" * 101, " '.' ", '""'])
def test_a_shard_refuses_a_label_that_no_answer_can_match(label):
    for task, num_boxes in (("classification", 0), ("detection", 1)):
        with pytest.raises(SampleError, match="a.tar: sample 'k0': bad labels: no answer can match.*rename the class"):
            check_labels([label], task, num_boxes, "a.tar", "k0")


def test_a_label_with_the_beginning_of_a_control_token_cannot_stand_between_tokens():
    sample = make_sample("detection", [KING], ["a <|b"])
    assert parse_boxes(format_answer(sample, make_frame(JSON), JSON), make_frame(JSON), JSON).labels == ("a <|b",)
    with pytest.raises(ValueError, match="begins a control token"):
        format_answer(sample, make_frame(TOKENS), TOKENS)


@pytest.mark.parametrize("text, part", [
    ("plain", "plain"), ("<think>x", None), ("<think>x</think> y", " y"), ("x</think>y", "y"),
    ("<think>a</think><answer>b</answer>c", "b"), ("<answer>a</answer><answer>b", "b"), ("", ""),
    ("<think>say <answer>a</answer>?</think>b", "b"), ("<think>say <answer>a</answer>, no, it is", None),
    ("<think>between <answer> and </answer></think><answer>b</answer>", "b"), ("<think>so <answer>a</answer>\n", "a"),
    ("<think>a</think>b<think>c", None), ("<think>a<think>b</think>c", "c"),
])
def test_the_part_that_is_the_answer(text, part):
    assert answer_part(text) == part


@pytest.mark.parametrize("text", ["None", " none.\n", "null", "[]", "[ ]", '"None"', "```json\n[]\n```",
                                  '{"objects": []}', "<think>hm</think><answer>None</answer>"])
def test_nothing_can_be_said(text):
    assert says_none(text)


@pytest.mark.parametrize("text", ["", " ", "<answer></answer>", "<think>None", "None of them", "not None", "{}", "[[]]",
                                  "no", "[1, 2, 3, 4]", "``````", "[" + " " * 1000 + "]"])
def test_saying_nothing_is_not_saying_that_there_is_nothing(text):
    assert not says_none(text)


@pytest.mark.parametrize("text", ["king of hearts", " King  of\nHearts. ", "'king of hearts'", "“King of hearts.”",
                                  "`king of hearts`", '{"label": "King of Hearts"}', "{'class': 'king of hearts'}",
                                  '```json\n{"label": "king of hearts", "confidence": 0.5}\n```',
                                  "<think>a queen?</think><answer>king of hearts</answer>"])
def test_one_class_in_many_dresses(text):
    assert class_name(text) == "king of hearts"


@pytest.mark.parametrize("text", ["", " ", ".", "'' .", "<think>king", "<answer></answer>", "{}", "[]",
                                  '{"label": 3}', "x" * 300, '{"label": "king", "class": "queen"}',
                                  '[{"label": "king"}, {"label": "queen"}]', '[{"label": "king"}]', "[king]",
                                  '{"label": "king"} or queen', '{"label": "king"} {"x": "queen"}',
                                  '{not really "label": "king"', '["label": "king" is what I would not say]',
                                  '{"label": "king", "label": "queen"}', '{"label": "king", "x": {"label": "queen"}}',
                                  '{"x": {"label": "king"}}', "{'label': 'king'} or 'queen'", '{"label": ["king"]}',
                                  '{"label": "', "{" * 1000, "[" * 800, '{"a":' * 160])
def test_no_class_or_several_are_none(text):
    assert class_name(text) == ""


GOOD = {
    "point": ['{"point_2d": [1, 2]}', '[{"point_2d": [1, 2.5], "label": "x"}]', '```json\n{"point_2d": [1, 2]}\n```'],
    "detection": ['[{"bbox_2d": [1, 2, 3, 4], "label": "x"}]', '{"label": "x", "bbox_2d": [1, 2, 3, 4], "score": 0.5}',
                  "None", "[]", "[ ]", "```json\n[]\n```"],
    "classification": ["king", "king of hearts.", '{"label": "king"}', '```json\n{"label": "king"}\n```'],
}
BAD = {
    "rec": ["None", "king", '{"point_2d": [1, 2]}'],
    "point": ["None", "[1, 2]", "(1, 2)", '{"bbox_2d": [1, 2, 3, 4]}', '{"point_2d": [1, 2, 3]}',
              '{"point_2d": [1, 2]} .', '{"point_2d": [NaN, 2]}'],
    "detection": ["none", "[[]]", '[{"bbox_2d": [1, 2, 3, 4]}]', '[{"bbox_2d": [3, 2, 1, 4], "label": "x"}]', "king"],
    "classification": ["", "a\nb", "{}", "<answer>king</answer>", "x" * 300,
                       '{"label": "king"} it is', '[{"label": "king"}]'],
}


@pytest.mark.parametrize("task", TASKS)
def test_the_strict_form_of_a_task(task):
    for text in GOOD.get(task, []):
        assert strict_format(text, JSON, False, task) is None, text
        assert strict_format(f"<think>x</think><answer>{text}</answer>", JSON, True, task) is None, text
        assert strict_format(text, JSON, True, task) == "no <think> and <answer>"
        assert strict_format(f"<think>\n\n</think>\n\n{text}", JSON, False, task) is None, text
        assert strict_format(f"<think>x</think>{text}", JSON, False, task), text
    for text in BAD[task]:
        assert strict_format(text, JSON, False, task), text
    with pytest.raises(ValueError, match="did you mean 'rec'"):
        strict_format("x", JSON, task="recs")


def test_the_strict_form_between_tokens():
    box, point = "<|box_start|>(1,2),(3,4)<|box_end|>", "<|box_start|>(1,2)<|box_end|>"
    name = "<|object_ref_start|>king<|object_ref_end|>"
    assert strict_format(point, TOKENS, task="point") is None
    assert strict_format(box, TOKENS, task="point") == "text around the point"
    assert strict_format(name + box + box + name + box, TOKENS, task="detection") is None
    assert strict_format(box, TOKENS, task="detection") == "text around the boxes"
    assert strict_format("None", TOKENS, task="detection") is None
    assert strict_format("[]", TOKENS, task="detection")
    assert strict_format(name + box, TOKENS) is None and strict_format(box + name + box, TOKENS) is None
    assert strict_format(name, TOKENS) and strict_format(box + name, TOKENS)
