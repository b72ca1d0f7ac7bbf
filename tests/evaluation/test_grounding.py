"""Evaluation figures: counted by hand, independent of ranks and duplicates, on the reward's own parser."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megavg.evaluation.grounding import GroundingScores
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


def filled(keys=tuple(ANSWERS)) -> GroundingScores:
    scores = GroundingScores()
    for key in keys:
        scores.add(make_sample(key), answer(ANSWERS[key]))
    return scores


def test_figures_equal_a_count_by_hand():
    assert filled().result() == {
        "num_samples": 8,
        "acc_at_50": 2 / 8,
        "acc_at_50_inclusive": 3 / 8,
        "mean_iou": pytest.approx((1 + 0.5 + 0.75 + 0.01) / 8),
        "parse_rate": 6 / 8,
        "center_in_box": 3 / 8,
        "reasons": {"ok": 2, "low overlap": 2, "no overlap": 2, "no JSON": 1, "degenerate box": 1},
    }


def test_a_row_says_what_was_asked_answered_and_found():
    row = GroundingScores().add(make_sample("above"), answer(ANSWERS["above"]))
    assert row == {
        "key": "above", "shard": "", "expression": "thing above", "text": "[0, 0, 100, 75]",
        "predicted_boxes_px": [[0, 0, 100, 75]],
        "true_boxes_px": [[0, 0, 100, 100]], "iou": pytest.approx(0.75), "parsed": True, "center_in_box": True,
        "reason": "ok",
    }


def test_rows_of_several_ranks_add_up_with_duplicates_counted_once():
    keys = list(ANSWERS)
    # Rank 1 was padded with the first sample of rank 0, as samplers do.
    ranks = [filled(keys[:4]).rows, filled([*keys[4:], keys[0]]).rows]
    gathered = json.loads(json.dumps(ranks))
    merged = GroundingScores(row for rows in gathered for row in rows)
    assert merged.result() == filled().result()
    assert GroundingScores(reversed(merged.rows)).result()["mean_iou"] == merged.result()["mean_iou"]


def test_one_key_in_two_shards_is_two_samples():
    """Keys are unique inside a set of shards only; dropping one of these would be a wrong denominator."""
    right, wrong = make_sample("above"), dataclasses.replace(make_sample("above"), shard="other.tar")
    scores = GroundingScores()
    scores.add(right, answer(ANSWERS["above"]))
    scores.add(wrong, answer("no idea"))
    assert scores.result()["num_samples"] == 2
    assert scores.result()["acc_at_50"] == 0.5


def test_several_true_boxes_are_measured_as_the_reward_does():
    sample = make_sample("two", TRUE_BOX, (500.0, 500.0, 600.0, 600.0))
    terms = load_rewards([{"name": "iou"}])
    for text, expected in [("[[500, 500, 600, 600], [0, 0, 100, 50]]", 0.75), ("[0, 0, 100, 100]", 0.5),
                           ("[[0, 0, 100, 100], [0, 0, 100, 100], [500, 500, 600, 600]]", 2 / 3)]:
        row = GroundingScores().add(sample, answer(text))
        assert row["iou"] == pytest.approx(expected) == pytest.approx(score(answer(text), sample, terms)[0])


def test_the_frame_of_the_family_is_used():
    frame = Frame(RESIZED_PX, 1000, 1000, 560, 560)
    row = GroundingScores().add(make_sample("px"), Completion("[0, 0, 56, 56]", "json_resized_px", frame))
    assert row["iou"] == pytest.approx(1)


def test_nothing_scored_and_a_foreign_frame_are_errors():
    with pytest.raises(ValueError, match="no sample was scored"):
        GroundingScores().result()
    frame = Frame(RELATIVE_1000, 999, 1000, 560, 560)
    with pytest.raises(ValueError, match="make the frame from this sample"):
        GroundingScores().add(make_sample("a"), Completion("[1, 2, 3, 4]", "json_relative_1000", frame))
