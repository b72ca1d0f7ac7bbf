"""The contract of every reward in the folder, the loader's errors, and the values of iou, giou and format."""

from __future__ import annotations

import math
import random
import sys

import pytest

from megavg.ops.answer_text import format_answer
from megavg.ops.box_text import BOX_FORMATS, FRAME_KIND, format_boxes
from megavg.protocols.plugin import names_in
from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, RewardResult, Sample
from megavg.rewards.base import Term, load_rewards, score

JSON, PIXELS, TOKENS = BOX_FORMATS
TRUE_BOX = (100.0, 50.0, 300.0, 150.0)


def make_sample(*boxes) -> Sample:
    return Sample("k0", "", None, 640, 480, "the red circle", boxes or (TRUE_BOX,))


def answer(text: str, box_format: str = JSON, truncated: bool = False) -> Completion:
    return Completion(text, box_format, Frame(FRAME_KIND[box_format], 640, 480, 644, 476), 12, truncated)


def written(*boxes, box_format: str = JSON) -> Completion:
    return answer(format_boxes(boxes, answer("", box_format).frame, box_format), box_format)


def only(config: dict, completion: Completion, sample: Sample | None = None) -> RewardResult:
    """The one result of a configuration with one reward."""
    _, results = score(completion, sample or make_sample(), load_rewards([config]))
    (result,) = results.values()
    return result


EMPTY = ["", " ", "\n\n", "[]", "{}", '{"bbox_2d": []}', "<answer></answer>", "<think>x</think><answer></answer>",
         "null", "<|box_start|><|box_end|>", '{"bbox_2d": [0, 0, 0, 0]}', "<|box_start|>(0,0),(0,0)<|box_end|>"]
HOSTILE = ["[" * 100_000, '{"bbox_2d": [NaN, NaN, NaN, NaN]}', '{"bbox_2d": [-1e308, -1e308, 1e308, 1e308]}',
           "[0, 0, 5, " + "9" * 10_000 + "]", "__import__('os')._exit(1)", "\x00\ud800\u202e", "[1,2,3,4]" * 5000,
           '{"bbox_2d": [-5, -5, 2000, 2000]}', "<think>" * 1000, "(1,2),(3,4)" * 5000, '"' * 1000 + "{"]


SECOND_BOX = (400.0, 200.0, 600.0, 400.0)
# What a reward is for; the others are for boxes.
TASK = {"point_in_box": "point", "detection": "detection", "classification": "classification"}


def samples_of(name: str) -> list[Sample]:
    """With one true answer and with several, where the task knows several."""
    task = TASK.get(name, "rec")
    labels = {"detection": ("king", "queen"), "classification": ("king", "monarch")}.get(task, ())
    boxes = () if task == "classification" else (TRUE_BOX, SECOND_BOX)
    return [Sample("k0", "", None, 640, 480, "it", boxes[:n], {}, task, labels[:n]) for n in (1, 2)]


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@pytest.mark.parametrize("name", names_in("megavg.rewards"))
def test_every_reward_keeps_the_contract(name, box_format):
    terms = load_rewards([{"name": name}])
    rng = random.Random(0)
    soup = ["".join(rng.choices('[]{}(),:"<|box_start|>bbox_2d 0123456789.-', k=60)) for _ in range(300)]
    for sample in samples_of(name):
        good = answer(format_answer(sample, answer("", box_format).frame, box_format), box_format)
        texts = [good.text, *EMPTY, *HOSTILE, *soup]
        for text in texts:
            for truncated in (False, True):
                total, results = score(answer(text, box_format, truncated), sample, terms)
                assert list(results) == [name] and total == results[name].score
                assert 0 <= total <= 1 and 0 < len(results[name].reason) <= 40
                assert text not in EMPTY or total == 0, (text, results)
        assert score(good, sample, terms)[0] > 0.9
    assert terms[0].function.__doc__ and "\n" in terms[0].function.__doc__


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_iou_is_measured_in_original_pixels_in_every_frame(box_format):
    half = (TRUE_BOX[0], TRUE_BOX[1], (TRUE_BOX[0] + TRUE_BOX[2]) / 2, TRUE_BOX[3])
    result = only({"name": "iou"}, written(half, box_format=box_format))
    assert result.reason == "ok" and result.score == pytest.approx(0.5, abs=0.01)


def test_iou_over_several_boxes_punishes_extra_and_missing_ones():
    other = (400.0, 200.0, 480.0, 264.0)
    two = make_sample(TRUE_BOX, other)
    exact = only({"name": "iou"}, written(other, TRUE_BOX), two)
    assert exact.reason == "ok" and exact.score > 0.97
    missing = only({"name": "iou"}, written(TRUE_BOX), two)
    assert missing.reason == "missing boxes" and missing.score == pytest.approx(0.5, abs=0.01)
    extra = only({"name": "iou"}, written(TRUE_BOX, other, other, other))
    assert extra.reason == "extra boxes" and extra.score == pytest.approx(0.25, abs=0.01)
    # Saying the same box again is no second find.
    assert only({"name": "iou"}, written(TRUE_BOX, TRUE_BOX), two).score == pytest.approx(0.5, abs=0.01)


def test_iou_threshold_and_reasons():
    half = written((100.0, 50.0, 180.0, 150.0))
    assert only({"name": "iou", "threshold": 0.5}, half) == RewardResult(0.0, "below threshold")
    assert only({"name": "iou", "threshold": 0.3}, half) == RewardResult(1.0, "ok")
    assert only({"name": "iou"}, written((400.0, 200.0, 500.0, 300.0))) == RewardResult(0.0, "no overlap")
    assert only({"name": "iou"}, answer('{"bbox_2d": [900, 900, 100, 100]}')) == RewardResult(0.0, "degenerate box")
    assert only({"name": "iou"}, answer('{"bbox_2d": [2000, 2000, 3000, 3000]}')) == RewardResult(0.0, "no overlap")


def test_giou_tells_near_from_far_and_unreadable_stays_at_zero():
    config = {"name": "iou", "kind": "giou"}
    near, far = written((310.0, 50.0, 400.0, 150.0)), written((600.0, 440.0, 640.0, 480.0))
    scores = [only(config, each).score for each in (written(TRUE_BOX), near, far, answer("[9, 9, 1, 1]"))]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4 and scores[-1] == 0
    assert only(config, near).reason == "no overlap"


def test_giou_by_its_own_name_is_the_same():
    rng = random.Random(5)
    for _ in range(50):
        x, y = rng.uniform(0, 500), rng.uniform(0, 400)
        completion = written((x, y, x + rng.uniform(5, 100), y + rng.uniform(5, 80)))
        assert only({"name": "giou"}, completion) == only({"name": "iou", "kind": "giou"}, completion)


def test_iou_matches_in_the_order_of_stated_confidence():
    # The second box fits exactly; the first is worse, and takes the true box unless the second is surer.
    both = '[{{"bbox_2d": [156, 104, 469, 208], "score": {}}}, {{"bbox_2d": [156, 104, 469, 313], "score": {}}}]'
    first, second = (only({"name": "iou"}, answer(both.format(*scores))).score for scores in ((0.9, 0.1), (0.1, 0.9)))
    assert first == pytest.approx(0.25, abs=0.01) and second == pytest.approx(0.5, abs=0.01)


def test_none_scores_where_nothing_is_true_and_only_there():
    empty = Sample("k0", "", None, 640, 480, "kings", (), {}, "detection")
    classes = Sample("k0", "", None, 640, 480, "king, queen", (), {}, "classification", ("king",))
    for config in ({"name": "iou"}, {"name": "giou"}, {"name": "iou", "threshold": 0.5}, {"name": "detection"}):
        assert only(config, answer("None"), empty) == RewardResult(1.0, "rightly none")
        assert only(config, answer("None")) == RewardResult(0.0, "wrongly none")
        assert only(config, answer(""), empty) == RewardResult(0.0, "empty answer")
        assert only(config, answer("nothing"), empty).score == 0
        assert only(config, written(TRUE_BOX), empty) == RewardResult(0.0, "no true box")
        assert only(config, answer("None"), classes).score == 0


def test_format_knows_the_forms_of_all_tasks():
    for name in TASK:
        for sample in samples_of(name):
            for box_format in BOX_FORMATS:
                text = format_answer(sample, answer("", box_format).frame, box_format)
                wrapped = f"<think>x</think><answer>{text}</answer>"
                assert only({"name": "format"}, answer(text, box_format), sample) == RewardResult(1.0, "ok")
                assert only({"name": "format", "thinking": True}, answer(wrapped, box_format), sample).score == 1
                assert only({"name": "format"}, answer(wrapped, box_format), sample).score == 0


def test_a_reward_for_some_tasks_gives_the_others_nothing():
    terms = load_rewards([{"name": "iou", "tasks": ["rec", "detection"]}, {"name": "point_in_box", "tasks": ["point"]}])
    boxed = written(TRUE_BOX)
    for task, total in (("rec", "iou"), ("point", "point_in_box")):
        sample = Sample("k0", "", None, 640, 480, "it", (TRUE_BOX,), {}, task)
        value, results = score(boxed, sample, terms)
        assert value == results[total].score > 0.9
        assert [name for name, result in results.items() if result.reason == "other task"] == \
            [name for name in ("iou", "point_in_box") if name != total]


def test_format_wants_the_exact_form():
    plain = written(TRUE_BOX)
    wrapped = answer(f"<think>on the left</think>\n<answer>{plain.text}</answer>")
    assert only({"name": "format"}, plain) == RewardResult(1.0, "ok")
    assert only({"name": "format"}, wrapped).score == 0
    assert only({"name": "format", "thinking": True}, wrapped) == RewardResult(1.0, "ok")
    assert only({"name": "format", "thinking": True}, plain) == RewardResult(0.0, "no <think> and <answer>")
    assert only({"name": "format"}, answer(plain.text, truncated=True)) == RewardResult(0.0, "truncated")
    assert only({"name": "format"}, answer(plain.text + " hm")) == RewardResult(0.0, "text around the boxes")
    assert only({"name": "format"}, written(TRUE_BOX, box_format=TOKENS)).score == 1


def test_the_sum_is_weighted_and_a_reward_listed_twice_keeps_both_results():
    strict, penalty = {"name": "iou", "weight": 0.5, "threshold": 0.9}, {"name": "format", "weight": -2}
    terms = load_rewards([{"name": "iou"}, strict, penalty])
    assert [term.name for term in terms] == ["iou", "iou_2", "format"]
    total, results = score(written((100.0, 50.0, 200.0, 150.0)), make_sample(), terms)
    assert results["iou_2"].score == 0 and results["format"].score == 1
    assert total == pytest.approx(results["iou"].score - 2)


@pytest.mark.parametrize("config, message", [
    ([], "one or more entries"),
    ("iou", "one or more entries"),
    (["iou"], r"rewards\[0\]: expected a mapping with a name"),
    ([{"weight": 1.0}], r"rewards\[0\]: expected a mapping with a name"),
    ([{"name": "iuo"}], r"rewards\[0\].name='iuo' does not exist \(did you mean 'iou'\?\)"),
    ([{"name": "iou"}, {"name": "format", "thinkin": True}],
     r"rewards\[1\] \(format\): there is no option 'thinkin' \(did you mean 'thinking'\?\)"),
    ([{"name": "iou", "threshold": "0.5"}], r"rewards\[0\] \(iou\).threshold: expected float \| None, got '0.5'"),
    ([{"name": "iou", "threshold": True}], "expected float"),
    ([{"name": "iou", "threshold": 0}], "0 < threshold <= 1"),
    ([{"name": "iou", "threshold": 0.5, "kind": "giou"}], "goes with kind='iou' only"),
    ([{"name": "iou", "kind": "diou"}], "expected one of 'iou', 'giou', got 'diou'"),
    ([{"name": "format", "thinking": 1}], "expected bool, got 1"),
    ([{"name": "iou", "weight": "1"}], r"rewards\[0\].weight: expected a finite number"),
    ([{"name": "iou", "weight": math.nan}], "expected a finite number"),
    ([{"name": "iou", "tasks": "rec"}], r"rewards\[0\].tasks: expected a list out of rec, point"),
    ([{"name": "iou", "tasks": ["recs"]}], r"rewards\[0\].tasks: expected a list out of rec, point"),
    ([{"name": "point_in_box", "iou_weight": -1.0}], "iou_weight: expected a weight of 0 or more, got -1.0"),
    ([{"name": "detection", "mode": "map75"}], "expected one of 'map', 'map50'"),
    ([{"name": "no_such_package.reward"}], "cannot import module 'no_such_package'"),
    ([{"name": "json.decoder"}], "holds no function named reward"),
    ([{"name": ".foo"}], r"rewards\[0\].name='.foo': expected a dotted name"),
    ([{"name": ".."}], r"rewards\[0\].name='..': expected a dotted name"),
])
def test_mistakes_in_the_configuration_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(config)


OUTSIDE = '''
"""Short answers."""
from megavg.protocols.sample import RewardResult


def reward(completion, sample, *, limit: int, note: list[str] | None = None):
    """Score 1 for at most ``limit`` characters."""
    short = 0 < len(completion.text) <= limit
    return RewardResult(float(short), "ok" if short else "too long")
'''


def test_a_dotted_name_loads_a_reward_from_outside(tmp_path, monkeypatch):
    package = tmp_path / "rewards_from_outside"
    package.mkdir()
    (package / "short.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "rewards_from_outside.short"
    try:
        assert only({"name": name, "limit": 3, "note": ["a"]}, answer("abcd")) == RewardResult(0.0, "too long")
        assert only({"name": name, "limit": 4}, answer("abcd")) == RewardResult(1.0, "ok")
        with pytest.raises(ValueError, match="'limit' has no default; set it"):
            load_rewards([{"name": name}])
        with pytest.raises(ValueError, match="limit: expected int, got 1.5"):
            load_rewards([{"name": name, "limit": 1.5}])
    finally:
        for module in (name, "rewards_from_outside"):
            sys.modules.pop(module, None)


@pytest.mark.parametrize("result", [RewardResult(math.nan, "ok"), RewardResult(1.0, ""), 1.0, RewardResult(1.0, None),
                                    RewardResult("1", "ok"), RewardResult(None, "ok"), RewardResult(math.inf, "ok")])
def test_a_reward_that_breaks_the_contract_is_named_with_the_sample(result):
    with pytest.raises(ValueError, match="reward 'mine' on sample 'k0'"):
        score(answer("x"), make_sample(), [Term("mine", 1.0, lambda completion, sample: result)])


@pytest.mark.parametrize("value", [1.01, 7, -0.5])
def test_a_score_beyond_0_to_1_is_refused_with_the_remedy(value):
    with pytest.raises(ValueError, match="reward 'mine' on sample 'k0': expected a score in 0..1.*its weight"):
        score(answer("x"), make_sample(), [Term("mine", 1.0, lambda completion, sample: RewardResult(value, "ok"))])
    rounded = [Term("mine", 1.0, lambda completion, sample: RewardResult(1 + 1e-15, "ok"))]
    assert score(answer("x"), make_sample(), rounded)[0] == pytest.approx(1)


def test_a_reward_that_fails_is_named_with_the_sample():
    with pytest.raises(ValueError, match="reward 'mine' on sample 'k0': ZeroDivisionError: .*zero") as error:
        score(answer("x"), make_sample(), [Term("mine", 1.0, lambda completion, sample: 1 / 0)])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_frame_of_another_image_is_refused():
    frame = Frame(RELATIVE_1000, 480, 640, 644, 476)
    with pytest.raises(ValueError, match="'k0' is 640 x 480 pixels, but its completion's frame says 480 x 640"):
        score(Completion("[1, 2, 3, 4]", JSON, frame), make_sample(), load_rewards([{"name": "iou"}]))
