"""VLM-R1's and LLaVA's conversations with boxes, written here from their definitions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.data.readers.answers import boxes_of, classes_of
from megavg.data.readers.conversations import read
from megavg.data.sample import SampleError, check_sample

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: "
OVD = "Please carefully check the image and detect the following objects: "


def talk(*turns: tuple, image="train2014/a.jpg", **fields) -> dict:
    """A LLaVA-style row of (question, answer) pairs."""
    said = [{"from": speaker, "value": value} for pair in turns for speaker, value in zip(("human", "gpt"), pair)]
    return {"id": 1, "image": image, "conversations": said, **fields}


def rec(solution=(103.93, 299.99, 238.15, 477.41), **fields) -> dict:
    """A row of VLM-R1's rec_jsons_processed."""
    return {"height": 640, "width": 427, "id": 0, "original_id": 1719310, "dataset_name": "refcoco", "category_id": 1,
            "image": "train2014/a.jpg", "problem": QUESTION + "the lady with the blue shirt.",
            "normal_caption": "the lady with the blue shirt", "solution": list(solution),
            "normalized_solution": [243, 468, 557, 745], **fields}


@pytest.fixture
def annotations(tmp_path, picture):
    """Factory of a file of rows beside a picture of 427 x 640; the suffix of its name chooses lines or a list."""
    def write(*rows, name: str = "rec.jsonl") -> str:
        picture("train2014/a.jpg", 427, 640)
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
        (tmp_path / name).write_text(text if name.endswith(".jsonl") else json.dumps(rows), encoding="utf-8")
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("name", ["rec.json", "rec.jsonl"])
def test_vlm_r1_rec(annotations, name):
    first, second = [draft.load() for draft in read(annotations(rec(), rec(), name=name), "pixels")]
    assert first.expression == "the lady with the blue shirt" and first.task == "rec" and first.key != second.key
    assert first.boxes_xyxy_px == ((103.93, 299.99, 238.15, 477.41),)
    assert first.meta == {"image": "train2014/a.jpg", "row_id": 0, "dataset": "refcoco", "source_frame": "pixels"}
    check_sample(first)


@pytest.mark.parametrize("answer", [
    [103, 299, 238, 477], "[103, 299, 238, 477]", "<answer> [103, 299, 238, 477] </answer>", "[[103, 299, 238, 477]]",
    '{"bbox_2d": [103, 299, 238, 477], "label": "lady"}', '```json\n[{"bbox_2d": [103, 299, 238, 477]}]\n```',
    "<ref>lady</ref><box>[[103, 299, 238, 477]]</box>", "It is at [103,299,238,477].",
    "<|object_ref_start|>lady<|object_ref_end|><|box_start|>(103,299),(238,477)<|box_end|>",
    "<think>[1, 2, 3, 4]?</think><answer>[103.0, 299.0, 238.0, 477.0]</answer>",
])
def test_answers_in_all_shapes(annotations, answer):
    row = talk(("<image>" + QUESTION + "the lady.", answer), image=["train2014/a.jpg"])
    (draft,) = read(annotations(row), "pixels")
    assert draft.load().boxes_xyxy_px == ((103.0, 299.0, 238.0, 477.0),) and draft.load().expression == "the lady"


def test_pixels_thousandths_and_shares_are_the_same_box(annotations, picture):
    wanted = (42.7, 64.0, 213.5, 640.0)
    for frame, told in (("pixels", wanted), ("relative_1000", (100, 100, 500, 1000)), ("relative_1", (.1, .1, .5, 1)),
                        ("relative_1_square", ((42.7 + 106) / 640, .1, (213.5 + 106) / 640, 1))):
        row = talk((f"<image>\n{QUESTION}<ref>a dog</ref>", json.dumps(told)))
        (draft,) = read(annotations(row), frame)
        assert draft.load().boxes_xyxy_px == (pytest.approx(wanted),) and draft.load().expression == "a dog"


def test_two_decimals_of_a_square_may_leave_the_picture(annotations):
    """LLaVA writes two decimals: 2.4 of 640 pixels at each end of a full height."""
    def told(*box):
        (draft,) = read(annotations(talk((QUESTION + "a dog", json.dumps(box)), width=640, height=480)),
                        "relative_1_square")
        return draft.outline().boxes_xyxy_px[0]

    assert told(.1, .12, .5, .88) == pytest.approx((64, 0, 320, 480))
    with pytest.raises(SampleError, match=r"leaves the 640 x 480 image by 9.6 pixels; allow so much with clip"):
        told(.1, .11, .5, .88)


def test_rows_of_text_alone_are_no_grounding_either(annotations):
    alone = {name: value for name, value in talk(("Why?", "So.")).items() if name != "image"}
    path = annotations(alone, {**alone, "image": None}, talk((QUESTION + "the dog", "[1, 2, 30, 40]")))
    (draft,) = read(path, "pixels", skip_other_turns=True)
    assert draft.load().expression == "the dog"
    with pytest.raises(SampleError, match="line 1.*expected one picture in 'image', got None"):
        next(read(path, "pixels")).load()


@pytest.mark.parametrize("frame, told, words", [
    ("pixels", [243, 468, 557, 745], "it would fit the frame 'relative_1000'"),
    ("pixels", [0.1, 0.2, 0.3, 0.4], "it fits the frame 'relative_1'"),
    ("relative_1", [103, 299, 238, 477], "it would fit the frame 'pixels' or 'relative_1000'"),
    ("relative_1000", [103, 299, 238, 1477], "none of pixels"),
])
def test_a_wrong_frame_says_which_would_fit(annotations, frame, told, words):
    (draft,) = read(annotations(rec(told)), frame)
    with pytest.raises(SampleError, match=words):
        draft.load()


def test_several_turns_and_others_between_them(annotations):
    path = annotations(talk(("<image>\nWhat is this?", "A dog."), (QUESTION + "the dog", "[1, 2, 30, 40]"),
                            (QUESTION + "the cat", "[5, 6, 70, 80]")), name="llava.json")
    drafts = list(read(path, "pixels"))
    with pytest.raises(SampleError, match=r"llava.json: item 0 turn 0.*question '<image>\\nWhat is this\?' does not"):
        drafts[0].load()
    found = [draft.load() for draft in read(path, "pixels", skip_other_turns=True)]
    assert [(s.expression, s.boxes_xyxy_px[0][2]) for s in found] == [("the dog", 30.0), ("the cat", 70.0)]
    assert [s.key for s in found] == [draft.key for draft in drafts[1:]] and len({d.key for d in drafts}) == 3


def test_a_question_of_ones_own(annotations):
    path = annotations(talk(("Where is the dog? Answer with a box.", "[1, 2, 30, 40]")))
    (draft,) = read(path, "pixels", question=r"Where is (?P<expression>.+)\? Answer.*")
    assert draft.load().expression == "the dog"
    with pytest.raises(ValueError, match="has no group"):
        next(read(path, "pixels", question="Where is (.+)"))
    with pytest.raises(ValueError, match="no regular expression"):
        next(read(path, "pixels", question="("))


def test_text_after_the_expression_is_no_part_of_it(annotations):
    (draft,) = read(annotations(talk((QUESTION + "the dog.\nThink first.", "[1, 2, 30, 40]"))), "pixels")
    with pytest.raises(SampleError, match="Think first"):
        draft.load()


BOXES = '```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "dog"}, {"bbox_2d": [5, 6, 70, 80], "label": "cat"}]\n```'


@pytest.mark.parametrize("asked", [
    '["dog", "cat"].', "['dog', 'cat']. Output the bbox coordinates of detected objects in <answer></answer>. The bbox",
    "\n- dog\n- cat", "{dog, cat}", "dog, cat",
])
def test_detection(annotations, asked):
    messages = {"images": ["train2014/a.jpg"], "messages": [
        {"role": "system", "content": "You help."}, {"role": "user", "content": "<image>First think. " + OVD + asked},
        {"role": "assistant", "content": f"<answer>\n{BOXES}\n</answer>"}]}
    path = annotations(messages, talk((OVD + asked, "None")))
    full, empty = [draft.load() for draft in read(path, "pixels", task="detection")]
    assert full.expression == empty.expression == "dog, cat" and full.labels == ("dog", "cat")
    assert full.boxes_xyxy_px == ((1.0, 2.0, 30.0, 40.0), (5.0, 6.0, 70.0, 80.0))
    assert empty.boxes_xyxy_px == () and empty.task == "detection"
    with pytest.raises(SampleError, match="a detection needs a label for each box"):
        next(read(annotations(talk((OVD + asked, "[1, 2, 30, 40]"))), "pixels", task="detection")).load()


@pytest.mark.parametrize("row, words", [
    ("{oops", "bad json"), ("[1]", "expected an object, got list"), (talk(image=["a", "b"]), "expected one picture"),
    (talk(image=None), "expected one picture"), ({"image": "a.jpg"}, "expected 'conversations'"),
    (talk((QUESTION + "x",)), "expected a question and its answer"),
    (talk((QUESTION + "x", "no idea")), "no box in the answer 'no idea'"),
    (talk((QUESTION + "x", {"bbox": "x"})), "no box in the answer"),
    (talk((QUESTION + "x", "[1, 2, 1, 40]")), "empty box"), (talk((QUESTION + "x", "None")), "at least one box"),
    (talk((QUESTION + "x", "[1, 2, 30, 40]"), image="gone.jpg"), "missing image"),
    (talk((QUESTION + "x", "[1, 2, 30, 40]"), width=7, height=7), "box outside image"),
    (talk((QUESTION + "x", [1, 2, True, 40])), "no box in the answer"),
    (rec(normal_caption="", problem="?"), "'?' does"),
])
def test_a_bad_row_is_named_and_spoils_no_other(annotations, row, words):
    drafts = list(read(annotations(row, rec()), "pixels"))
    assert len(drafts) == 2 and drafts[1].load().expression == "the lady with the blue shirt"
    with pytest.raises(SampleError) as caught:
        drafts[0].load()
    assert words in str(caught.value) and "rec.jsonl: line 1" in str(caught.value)


@pytest.mark.parametrize("options, words", [
    ({"frame": "px"}, "unknown frame 'px' of the boxes; expected one of pixels, relative_1"),
    ({"frame": "pixels", "task": "classification"}, "task='classification' is none of rec, point, detection"),
    ({"frame": "pixels", "image_root": "gone"}, "image_root='gone' does not exist"),
    ({"frame": "pixels", "annotations": "gone.json"}, "cannot read annotations 'gone.json'"),
])
def test_what_is_told_at_once(annotations, options, words):
    with pytest.raises(ValueError, match=words):
        next(read(**{"annotations": annotations(rec()), **options}))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(alphabet='[](){}<>,."0123456789eE-+ \nbox_2dlabelNanif`json/', max_size=200), st.text(),
                 st.recursive(st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=3)),
                              lambda part: st.lists(part, max_size=5) | st.dictionaries(
                                  st.sampled_from(["bbox_2d", "label", "bbox"]), part))))
def test_no_answer_breaks_the_parser(answer):
    found = boxes_of(answer)
    assert found is None or all(len(box) == 4 and (label is None or isinstance(label, str)) for box, label in found)
    if isinstance(answer, str):
        assert isinstance(classes_of(answer), str)


def test_deep_and_long_answers_are_quick():
    assert boxes_of("[" * 100_000) is None and boxes_of("(1,2" * 20_000) is None
