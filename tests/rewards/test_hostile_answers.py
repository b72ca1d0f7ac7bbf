"""A hundred thousand hostile answers to every reward: no error, and no credit without a real box, point or class."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.ops.answer_text import format_answer
from megavg.ops.box_text import BOX_FORMATS, FRAME_KIND
from megavg.protocols.plugin import names_in
from megavg.protocols.sample import TASKS, Completion, Frame, Sample
from megavg.rewards.base import load_rewards, score
from tests.rewards.slow_reader import has_box, has_class, has_form, has_point

pytestmark = pytest.mark.slow

JSON, PIXELS, TOKENS = BOX_FORMATS
KING, QUEEN = (100.0, 50.0, 300.0, 150.0), (400.0, 200.0, 600.0, 400.0)
SAMPLES = {
    "rec": Sample("k", "", None, 640, 480, "it", (KING,), {}, "rec"),
    "point": Sample("k", "", None, 640, 480, "it", (KING,), {}, "point"),
    "detection": Sample("k", "", None, 640, 480, "cards", (KING, QUEEN), {}, "detection", ("king", "queen")),
    "classification": Sample("k", "", None, 640, 480, "card", (), {}, "classification", ("king",)),
}
TERMS = load_rewards([*({"name": name} for name in names_in("megavg.rewards")),
                      {"name": "point_in_box", "iou_weight": 0.25, "size_weight": 0.125},
                      {"name": "detection", "mode": "map50", "length_penalty": True, "match_labels": False}])

PIECES = [
    *"[]{}(),:\"'\\ \n`-.e07|<>", ", ", "```json", "bbox_2d", '"bbox_2d": ', '"point_2d": [', '"label": "king"', "None",
    '"score": 1e999', "<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<think>", "</think>", "<answer>",
    "</answer>", "NaN", "-Infinity", "1e400", "1e9999", "12", "500", "999.5", "-1", "9" * 30, "9" * 400, "0x1F", "1_0",
    "null", "true", "é", "框", "١٢", "４", "\x00", "\u202e", "\ud800", "\\ud800", "\\u0000", "<b>", "&lt;",
    "<script>",
    "__import__('os').system('x')", "eval(input())", "lambda: 0", "{{", "%s%n", "${x}", "[" * 50, "{" * 50, "]" * 50,
    '{"a":' * 30, "king", "queen", "click(", "x=1", "\u2028",
]


def frame(box_format: str) -> Frame:
    return Frame(FRAME_KIND[box_format], 640, 480, 644, 476)


VALID = [format_answer(sample, frame(box_format), box_format)
         for sample in SAMPLES.values() for box_format in BOX_FORMATS]


def fuzzed(rng: random.Random) -> str:
    """Soup of pieces, or a valid answer of any family and task, changed, cut off, repeated or nested."""
    kind = rng.random()
    if kind < 0.25:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 30)))
    text = rng.choice(VALID)
    if rng.random() < 0.2:
        text = f"<think>{rng.choice(PIECES)}</think><answer>{text}</answer>"
    if kind < 0.4:
        return text[:rng.randrange(len(text) + 1)]
    if kind < 0.45:
        return rng.choice("[{(") * rng.randint(1, 500) + text * rng.randint(1, 3)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.randint(0, 6):]
    return text


def check(text: str, box_format: str, task: str) -> dict[str, float]:
    """Every reward's score of one answer, after asking that none of them gives credit for nothing."""
    _, results = score(Completion(text, box_format, frame(box_format)), SAMPLES[task], TERMS)
    for name, result in results.items():
        assert 0 <= result.score <= 1 and 0 < len(result.reason) <= 40
        if not result.score:
            continue
        if name == "classification":
            real = task == "classification" and has_class(text, "king")
        elif name == "format":
            real = has_form(text, box_format, task)
        else:
            real = (has_point if name.startswith("point_in_box") else has_box)(text, box_format)
        assert real, (name, box_format, task, text[:300], result)
    return {name: result.score for name, result in results.items()}


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_thousand_hostile_answers(seed):
    rng = random.Random(20261000 + seed)
    credited = dict.fromkeys((term.name for term in TERMS), 0)
    start = time.process_time()
    for _ in range(100_000 // 5):
        for name, value in check(fuzzed(rng), rng.choice(BOX_FORMATS), rng.choice(TASKS)).items():
            credited[name] += value > 0
    print(f"{time.process_time() - start:.1f} s of one core; answers with credit: {credited}")
    # Both outcomes must be there, or the check above has checked nothing.
    assert all(50 < count < 10_000 for count in credited.values()), credited


@settings(max_examples=300, deadline=None)
@given(st.text(), st.sampled_from(BOX_FORMATS), st.sampled_from(TASKS))
def test_any_text_is_judged_without_an_error(text, box_format, task):
    check(text, box_format, task)


TWO_BOXES = {
    "rec": Sample("k", "", None, 640, 480, "it", (KING, QUEEN), {}, "rec"),
    "detection": SAMPLES["detection"],
    "point": SAMPLES["point"],
}


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@pytest.mark.parametrize("task", TWO_BOXES)
def test_an_answer_that_is_cut_off_earns_nothing(task, box_format):
    text = format_answer(TWO_BOXES[task], frame(box_format), box_format)
    texts = {text[:end] for end in range(1, len(text))}
    if box_format != TOKENS:
        texts |= {f"```json\n{each}" for each in texts}
        texts |= {f"<think>so</think><answer>{each}" for each in texts}
        texts |= {each.replace('"', "'") for each in texts}
    for each in texts:
        # Up to the end of a box between its tokens, an answer is a whole one.
        if not each.endswith("<|box_end|>"):
            results = check(each, box_format, task)
            assert not any(value for name, value in results.items() if name != "classification"), (each, results)
    assert check(text, box_format, task)["iou" if task != "point" else "point_in_box"] > 0.4


NUMBERS = st.one_of(st.floats().map(repr), st.integers().map(str),
                    st.sampled_from(["1e400", "-0", "NaN", "Infinity", "0x10", "1_0", "١", "", "null", "9" * 5000]))


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBERS, max_size=6), st.sampled_from(['{{"bbox_2d": [{}]}}', '{{"point_2d": [{}]}}', "[{}]", "({})",
                                                       "<|box_start|>({})<|box_end|>", "click({})"]),
       st.sampled_from(BOX_FORMATS), st.sampled_from(TASKS))
def test_any_numbers_are_judged_without_an_error(numbers, form, box_format, task):
    check(form.format(", ".join(numbers)), box_format, task)


@pytest.mark.parametrize("text", ["[" * 10_000_000, '{"bbox_2d":[' * 20_000, "[1,2,3,4]," * 20_000, "(1,2)," * 20_000,
                                  '{"label":"king"},' * 10_000, "None" * 20_000, "<think>" * 20_000, "king " * 20_000])
def test_very_long_answers_score_nothing_and_end(text):
    for box_format in BOX_FORMATS:
        for task in TASKS:
            if len(text) < 5_000_000 or (box_format, task) == (PIXELS, "detection"):
                assert set(check(text, box_format, task).values()) == {0.0}
