"""Rows and figures of each task: counted by hand, independent of ranks and duplicates, on the reward's own parsers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.evaluation.figures import AnswerScores, figures, headline, summary
from megavg.evaluation.rows import answer_row
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Completion, Frame, Sample
from megavg.rewards.base import load_rewards, score

TRUE_BOX = (0.0, 0.0, 100.0, 100.0)


def make_sample(key: str, *boxes) -> Sample:
    return Sample(key, "", None, 1000, 1000, f"thing {key}", boxes or (TRUE_BOX,))


def answer(text: str) -> Completion:
    return Completion(text, "json_relative_1000", Frame(RELATIVE_1000, 1000, 1000, 560, 560))


ANSWERS = {
    "exact": "[0, 0, 100, 100]",          # IoU 1
    "half": "[0, 0, 100, 50]",            # IoU exactly 0.5, centre inside
    "above": "[0, 0, 100, 75]",           # IoU 0.75
    "beside": "[100, 100, 200, 200]",     # IoU 0
    "around": "[0, 0, 1000, 1000]",       # IoU 0.01, centre outside
    "silent": "I cannot see it",
    "swapped": "[100, 100, 0, 0]",
    "second": "[[500, 500, 600, 600], [0, 0, 100, 100]]",  # only the first box counts
}


def filled(keys=tuple(ANSWERS)) -> AnswerScores:
    scores = AnswerScores()
    for key in keys:
        scores.add(make_sample(key), answer(ANSWERS[key]))
    return scores


def test_figures_equal_a_count_by_hand():
    assert filled().result() == {
        "task": "rec",
        "num_samples": 8,
        "correct_rate": 2 / 8,
        "parse_rate": 6 / 8,
        "truncated_rate": 0.0,
        "acc_at_50": 2 / 8,
        "acc_at_50_inclusive": 3 / 8,
        "acc_at_70": 2 / 8,
        "acc_at_90": 1 / 8,
        "mean_iou": pytest.approx((1 + 0.5 + 0.75 + 0.01) / 8),
        "center_in_box": 3 / 8,
        "reasons": {"ok": 2, "low overlap": 2, "no overlap": 2, "no JSON": 1, "degenerate box": 1},
    }


def test_a_row_says_what_was_asked_answered_and_found():
    sample = dataclasses.replace(make_sample("above"), meta={"split": "val", "source": "elsewhere"})
    assert answer_row(sample, answer(ANSWERS["above"])) == {
        "key": "above", "shard": "", "task": "rec", "expression": "thing above", "text": "[0, 0, 100, 75]",
        "truncated": False, "meta": {"split": "val"}, "true_boxes_px": [[0, 0, 100, 100]],
        "predicted_boxes_px": [[0, 0, 100, 75]], "iou": pytest.approx(0.75), "parsed": True, "correct": True,
        "center_in_box": True, "reason": "ok",
    }


def test_rows_of_several_ranks_add_up_with_duplicates_counted_once():
    keys = list(ANSWERS)
    # Rank 1 was padded with the first sample of rank 0, as samplers do.
    ranks = [filled(keys[:4]).rows, filled([*keys[4:], keys[0]]).rows]
    gathered = json.loads(json.dumps(ranks))
    merged = AnswerScores(row for rows in gathered for row in rows)
    assert merged.result() == filled().result()
    assert AnswerScores(reversed(merged.rows)).result()["mean_iou"] == merged.result()["mean_iou"]


def test_one_key_in_two_shards_is_two_samples():
    """Keys are unique inside a set of shards only; dropping one of these would be a wrong denominator."""
    right, wrong = make_sample("above"), dataclasses.replace(make_sample("above"), shard="other.tar")
    scores = AnswerScores()
    scores.add(right, answer(ANSWERS["above"]))
    scores.add(wrong, answer("no idea"))
    assert scores.result()["num_samples"] == 2
    assert scores.result()["acc_at_50"] == 0.5


def test_several_true_boxes_are_measured_as_the_reward_does():
    sample = make_sample("two", TRUE_BOX, (500.0, 500.0, 600.0, 600.0))
    terms = load_rewards([{"name": "iou"}])
    for text, expected in [("[[500, 500, 600, 600], [0, 0, 100, 50]]", 0.75), ("[0, 0, 100, 100]", 0.5),
                           ("[[0, 0, 100, 100], [0, 0, 100, 100], [500, 500, 600, 600]]", 2 / 3)]:
        row = AnswerScores().add(sample, answer(text))
        assert row["iou"] == pytest.approx(expected) == pytest.approx(score(answer(text), sample, terms)[0])


def test_several_true_boxes_count_by_confidence_as_in_the_reward():
    """Greedy matching depends on the order: here the first answered box would take the other's true box."""
    sample = make_sample("two", TRUE_BOX, (200.0, 200.0, 300.0, 300.0))
    answered = [([0, 0, 100, 250], 0.1), ([0, 0, 100, 100], 0.9)]
    text = json.dumps([{"bbox_2d": box, "score": stated} for box, stated in answered])
    row, terms = answer_row(sample, answer(text)), load_rewards([{"name": "iou"}])
    assert row["iou"] == pytest.approx(0.5) == pytest.approx(score(answer(text), sample, terms)[0])
    assert row["predicted_boxes_px"] == [box for box, _ in answered], "the row keeps the order of the answer"
    unranked = json.dumps([{"bbox_2d": box} for box, _ in answered])
    assert answer_row(sample, answer(unranked))["iou"] == pytest.approx(0.2)
    assert score(answer(unranked), sample, terms)[0] == pytest.approx(0.2)


def test_of_one_true_box_the_first_answered_counts_whatever_confidence_it_states():
    text = '[{"bbox_2d": [0, 0, 100, 50], "score": 0.1}, {"bbox_2d": [0, 0, 100, 100], "score": 0.9}]'
    assert answer_row(make_sample("one"), answer(text))["iou"] == pytest.approx(0.5)


def test_detections_are_matched_by_confidence():
    text = ('[{"bbox_2d": [0, 0, 100, 250], "label": "king", "score": 0.1}, '
            '{"bbox_2d": [0, 0, 100, 100], "label": "king", "score": 0.9}]')
    row = answer_row(detection((A, "king"), (B, "king")), answer(text))
    assert (row["iou"], row["reason"]) == (pytest.approx(0.5), "missing boxes")


def test_the_frame_of_the_family_is_used():
    frame = Frame(RESIZED_PX, 1000, 1000, 560, 560)
    row = AnswerScores().add(make_sample("px"), Completion("[0, 0, 56, 56]", "json_resized_px", frame))
    assert row["iou"] == pytest.approx(1)


def test_nothing_scored_and_a_foreign_frame_are_errors():
    with pytest.raises(ValueError, match="no sample was scored"):
        AnswerScores().result()
    frame = Frame(RELATIVE_1000, 999, 1000, 560, 560)
    with pytest.raises(ValueError, match="make the frame from this sample"):
        AnswerScores().add(make_sample("a"), Completion("[1, 2, 3, 4]", "json_relative_1000", frame))


def test_a_task_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="has task 'count', expected one of rec, point, detection, classification"):
        answer_row(dataclasses.replace(make_sample("a"), task="count"), answer("[1, 2, 3, 4]"))


POINTS = {
    '{"point_2d": [100, 100]}': (True, True, 0.0, "ok"),               # on the corner: edges are included
    '{"point_2d": [50, 104]}': (True, False, 4.0, "outside the box"),
    '{"point_2d": [103, 104]}': (True, False, 5.0, "outside the box"),  # 3 and 4 away from the corner
    '{"bbox_2d": [0, 0, 20, 20]}': (True, True, 0.0, "ok"),            # a box counts by its centre
    "somewhere on the left": (False, False, None, None),
    "": (False, False, None, "empty answer"),
}


@pytest.mark.parametrize("text", POINTS)
def test_points(text):
    parsed, correct, miss, reason = POINTS[text]
    row = answer_row(dataclasses.replace(make_sample("p"), task="point"), answer(text))
    assert (row["parsed"], row["correct"], row["center_in_box"]) == (parsed, correct, correct)
    assert row["miss_px"] == (miss if miss is None else pytest.approx(miss))
    assert reason is None and row["reason"] != "ok" or row["reason"] == reason
    assert row["iou"] == pytest.approx(0.04 if "bbox" in text else 0)


def test_the_first_point_counts_and_any_true_box_is_right():
    sample = dataclasses.replace(make_sample("p", TRUE_BOX, (500.0, 500.0, 600.0, 600.0)), task="point")
    both = '[{"point_2d": [550, 550]}, {"point_2d": [900, 900]}]'
    assert answer_row(sample, answer(both))["correct"]
    turned = '[{"point_2d": [900, 900]}, {"point_2d": [550, 550]}]'
    row = answer_row(sample, answer(turned))
    assert not row["correct"] and row["miss_px"] == pytest.approx(2 ** 0.5 * 300)
    assert len(row["predicted_points_px"]) == 2


def detection(*pairs) -> Sample:
    return Sample("d", "", None, 1000, 1000, "king, queen", tuple(box for box, _ in pairs), {}, "detection",
                  tuple(label for _, label in pairs))


def boxes(*pairs) -> str:
    return json.dumps([{"bbox_2d": list(box), "label": label} for box, label in pairs])


A, B, C = (0.0, 0.0, 100.0, 100.0), (200.0, 200.0, 300.0, 300.0), (600.0, 600.0, 700.0, 700.0)
DETECTIONS = [
    ([(A, "king"), (B, "queen")], boxes((B, "Queen"), (A, " king ")), True, 1.0, "ok"),
    ([(A, "king"), (B, "queen")], boxes((A, "queen"), (B, "king")), False, 0.0, "no object found"),
    ([(A, "king"), (B, "queen")], boxes((A, "king")), False, 0.5, "missing boxes"),
    ([(A, "king")], boxes((A, "king"), (A, "king")), False, 0.5, "extra boxes"),
    ([(A, "king")], boxes((A, "king"), (C, "king")), False, 0.5, "extra boxes"),
    ([], "None", True, 1.0, "ok"),
    ([], "[]", True, 1.0, "ok"),
    ([], boxes((A, "king")), False, 0.0, "nothing is there"),
    ([(A, "king")], "None", False, 0.0, "said there is nothing"),
    ([], "", False, 0.0, "empty answer"),
    ([(A, "king")], '{"bbox_2d": [0, 0, 100, 100]}', False, 0.0, "no object found"),
]


@pytest.mark.parametrize("truth, text, correct, overlap, reason", DETECTIONS)
def test_detections(truth, text, correct, overlap, reason):
    row = answer_row(detection(*truth), answer(text))
    assert (row["correct"], row["iou"], row["reason"]) == (correct, pytest.approx(overlap), reason)
    assert row["parsed"] == (reason != "empty answer")
    assert len(row["predicted_boxes_px"]) == len(row["predicted_labels"]) == len(row["predicted_scores"])


@pytest.mark.parametrize("text, correct, reason", [
    ("Golden Retriever", True, "ok"), (" \"golden  retriever\". ", True, "ok"), ("dog", True, "ok"),
    ('{"label": "dog"}', True, "ok"), ("<think>a dog?</think><answer>cat</answer>", False, "wrong class"),
    ("retriever", False, "wrong class"), ("", False, "empty answer"), ("<think>a dog", False, "empty answer"),
])
def test_classifications(text, correct, reason):
    sample = Sample("c", "", None, 10, 10, "dog, cat", (), {}, "classification", ("golden retriever", "dog"))
    frame = Frame(RELATIVE_1000, 10, 10, 28, 28)
    row = answer_row(sample, Completion(text, "json_relative_1000", frame))
    assert (row["correct"], row["reason"], row["parsed"]) == (correct, reason, reason != "empty answer")


def test_accuracy_over_samples_and_over_classes():
    frame = Frame(RELATIVE_1000, 10, 10, 28, 28)
    scores = AnswerScores()
    for i, (label, text) in enumerate([("cat", "cat"), ("cat", "cat"), ("cat", "dog"), ("dog", "cat")]):
        sample = Sample(f"c{i}", "", None, 10, 10, "dog, cat", (), {}, "classification", (label,))
        scores.add(sample, Completion(text, "json_relative_1000", frame))
    result = scores.result()
    assert result["accuracy"] == 0.5 and result["macro_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert headline(result) == ("accuracy", 0.5) and summary(result) == "accuracy 0.500  parsed 1.000  (4 samples)"


def test_a_set_of_several_tasks_keeps_them_apart():
    rows = [*filled().rows, answer_row(dataclasses.replace(make_sample("p"), task="point"), answer("[50, 50]")),
            {**answer_row(detection((A, "king")), answer(boxes((A, "king")))), "truncated": True}]
    result = figures(rows)
    assert result["task"] == "mixed" and result["num_samples"] == 10 and result["truncated_rate"] == 0.1
    assert result["tasks"]["rec"] == filled().result()
    assert result["tasks"]["point"]["accuracy"] == 1 and result["tasks"]["detection"]["map"] == pytest.approx(1)
    assert headline(result) == ("correct", 4 / 10)


@pytest.mark.parametrize("task", ["rec", "point", "detection", "classification"])
@settings(deadline=None, max_examples=150)
@given(text=st.one_of(st.text(), st.text(alphabet="[]{}(),:.-+0123456789eE\"<|>abox_start2dlineN \n"), st.sampled_from([
    "[[" * 5000, '{"bbox_2d": [1e400, NaN, -Infinity, 1]}', "[1e6, -1e6, 1e6, 1e6]", '{"point_2d": [1e6, -1e6]}',
    "<answer>" * 500, '[{"bbox_2d": [0, 0, 1, 1], "label": "\ud800", "score": 1e999}]'])))
def test_no_text_breaks_a_row(task, text):
    sample = {"rec": make_sample("a"), "point": dataclasses.replace(make_sample("a"), task="point"),
              "detection": detection((A, "king")),
              "classification": Sample("a", "", None, 1000, 1000, "x, y", (), {}, "classification", ("x",))}[task]
    row = answer_row(sample, answer(text))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert 0 <= row["iou"] <= 1 and (row["parsed"] or not row["correct"]) and row["reason"]
