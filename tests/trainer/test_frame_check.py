"""The frame check's readings and its rule, on written answers; what it does before a training stands beside."""

from __future__ import annotations

import json
import random

import pytest

from megavg.data.noise import add_noise
from megavg.ops.box_formats import BOX_FORMATS, FRAME_KIND, TOKENS
from megavg.ops.boxes import iou
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Completion, Frame, Sample
from megavg.trainer.bad_data import BadData
from megavg.trainer.frame_check import FrameReport, known_samples
from megavg.trainer.frame_look import CANDIDATES, OTHER, OWN, look_at, to_px, true_boxes
from tests.rank_threads import Exchange, in_threads

SIZES = ((1280, 800), (640, 480), (427, 640), (1920, 1080), (300, 500), (2000, 1500), (1000, 700), (333, 777))


def resized(width: int, height: int) -> tuple[int, int]:
    """Sides after a resize to multiples of 28 pixels with at most 64 * 28 * 28 pixels in all."""
    scale = min(1.0, (64 * 28 * 28 / (width * height))**0.5)
    return tuple(max(28, int(side * scale) // 28 * 28) for side in (width, height))


def sample(number: int, task: str = "rec", count: int = 1) -> Sample:
    width, height = SIZES[number % len(SIZES)]
    rng = random.Random(number)
    boxes = []
    for _ in range(count):
        x, y = rng.uniform(0.05, 0.5) * width, rng.uniform(0.05, 0.6) * height
        boxes.append((x, y, x + rng.uniform(0.15, 0.45) * width, y + rng.uniform(0.1, 0.3) * height))
    labels = ("thing",) * count if task == "detection" else ()
    return Sample(f"k{number}", "s.tar", None, width, height, f"thing {number}", tuple(boxes), {}, task, labels)


def in_frame(box, unit: str, order: str, frame: Frame) -> list[float]:
    """The numbers of a box of original pixels in a candidate frame."""
    one = to_px((1.0, 1.0, 1.0, 1.0), unit, "xy", frame)
    numbers = [value / one[i] for i, value in enumerate(box)]
    numbers = [round(n, 4) for n in numbers] if unit == "relative_1" else [float(round(n)) for n in numbers]
    return numbers if order == "xy" else [numbers[1], numbers[0], numbers[3], numbers[2]]


def written(boxes: list[list[float]], as_tokens: bool, task: str = "rec") -> str:
    if task == "point":
        points = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes]
        return "".join(f"<|box_start|>({x},{y})<|box_end|>" for x, y in points) if as_tokens else \
            json.dumps([{"point_2d": point} for point in points])
    if as_tokens:
        return "".join(f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>" for x0, y0, x1, y1 in boxes)
    return json.dumps([{"bbox_2d": box} for box in boxes])


def completion(asked: Sample, text: str, box_format: str, truncated: bool = False) -> Completion:
    frame = Frame(FRAME_KIND[box_format], asked.width, asked.height, *resized(asked.width, asked.height))
    return Completion(text, box_format, frame, 9, truncated)


def report(box_format: str, texts, task: str = "rec", needs_answers: bool = True, count: int = 1) -> FrameReport:
    """``texts`` are answers, or a function (sample, frame) -> answer for each of 8 samples."""
    looks = []
    for number in range(8 if callable(texts) else len(texts)):
        asked = sample(number, task, count)
        frame = completion(asked, "", box_format).frame
        text = texts(asked, frame) if callable(texts) else texts[number]
        looks.append(look_at(completion(asked, text, box_format), asked, f"find {asked.expression}"))
    return FrameReport(tuple(looks), box_format, needs_answers)


def answering_in(unit: str, order: str, as_tokens: bool, task: str = "rec"):
    return lambda asked, frame: written([in_frame(box, unit, order, frame) for box in asked.boxes_xyxy_px], as_tokens,
                                        task)


@pytest.mark.parametrize("task, count", [("rec", 1), ("rec", 3), ("point", 1), ("detection", 2)])
@pytest.mark.parametrize("unit, order", CANDIDATES)
@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_every_frame_is_recognised(box_format, unit, order, task, count):
    found = report(box_format, answering_in(unit, order, box_format == TOKENS, task), task, count=count)
    assert CANDIDATES[found.best] == (unit, order) and found.means[found.best] > 0.8
    own = (unit, order) == (FRAME_KIND[box_format], "xy")
    assert found.verdict == ("fits" if own else "other frame") and found.stops == (not own)
    assert ("To mend it" in found.message()) == (not own)


@pytest.mark.parametrize("box_format, unit, as_tokens, expected", [
    ("json_resized_px", RELATIVE_1000, False, "json_relative_1000"),
    ("json_relative_1000", RESIZED_PX, False, "json_resized_px"),
    ("json_relative_1000", RELATIVE_1000, True, "tokens_relative_1000"),
    ("json_resized_px", RELATIVE_1000, True, "tokens_relative_1000"),
    ("tokens_relative_1000", RELATIVE_1000, False, "json_relative_1000"),
    ("tokens_relative_1000", RESIZED_PX, False, "json_resized_px")])
def test_the_remedy_names_the_box_format(box_format, unit, as_tokens, expected):
    found = report(box_format, answering_in(unit, "xy", as_tokens))
    other_kind = as_tokens != (box_format == TOKENS)
    assert {look.written for look in found.looks} == {OTHER if other_kind else OWN}
    assert found.verdict == "other frame" and f"set model.box_format={expected};" in found.message()
    assert ("cannot read" in found.table()) == other_kind
    again = report(expected, answering_in(unit, "xy", as_tokens))
    assert again.verdict == "fits" and not again.stops, "the remedy mends it"


@pytest.mark.parametrize("unit, order", [("original_px", "xy"), ("relative_1", "xy"), (RELATIVE_1000, "yx")])
def test_the_remedy_where_no_box_format_helps(unit, order):
    message = report("json_relative_1000", answering_in(unit, order, False)).message()
    assert "no box format of megavg reads this" in message and "model.box_format=json" in message.split("To mend")[0]


def test_the_message_shows_three_answers_the_table_and_the_way_out():
    lines = report("json_resized_px", answering_in(RELATIVE_1000, "xy", False)).message().splitlines()
    assert lines[0].startswith("frame check: the starting model answers in another frame than this run reads")
    assert all(f"k{i}: asked 'find thing {i}', answered '[{{" in lines[i + 1] for i in range(3))
    assert lines[4] == "  mean IoU  read as" and lines[5].strip().endswith("0..1000 of the image")
    assert len([line for line in lines if line.endswith("<- model.box_format=json_resized_px")]) == 1
    assert len(lines) == 1 + 3 + 1 + len(CANDIDATES) + 1 and "data.check_frame=off" in lines[-1]


def test_answers_that_do_not_parse_stop_only_what_learns_from_them():
    texts = ["", "I do not know", "{}", "[1, 2]", "[1, 2, 3, four]", "<think>", "no", "[[[["]
    for needs_answers in (True, False):
        found = report("json_relative_1000", texts, needs_answers=needs_answers)
        assert found.verdict == "no answer parses" and found.stops == needs_answers
    assert "do not parse as json_relative_1000: 0 of 8" in found.message()
    cut = FrameReport((look_at(completion(sample(0), "<think>", "json_resized_px", True), sample(0)),) * 8,
                      "json_resized_px", True)
    assert "raise rollout.max_new_tokens (8 answers were cut off)" in cut.message()


def test_none_is_an_answer_of_a_detection():
    found = report("json_relative_1000", ["None"] * 8, "detection")
    assert found.verdict == "fits" and found.own_mean == 0 and not found.stops
    assert report("json_relative_1000", ["None"] * 8, "rec").stops


def test_few_answers_say_nothing():
    right = answering_in(RESIZED_PX, "xy", False)

    def mostly_silent(asked, frame):
        return right(asked, frame) if asked.key in ("k0", "k1", "k2") else "none"

    found = report("json_relative_1000", mostly_silent)
    assert len(found.read) == 3 and found.verdict == "too few answers" and not found.stops
    assert "nothing can be said" in found.message()
    nothing = FrameReport((), "json_relative_1000", True)
    assert nothing.verdict == "nothing known" and not nothing.stops and "nothing can be said" in nothing.message()


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_a_model_that_finds_little_is_not_stopped(box_format):
    """Boxes that have nothing to do with the truth fit all frames about equally badly."""
    stopped = 0
    for trial in range(400):
        rng = random.Random(trial)

        def blind(asked, frame, rng=rng):
            unit = FRAME_KIND[box_format]
            width, height = (1000, 1000) if unit == RELATIVE_1000 else (frame.resized_width, frame.resized_height)
            x, y = rng.uniform(0, 0.7) * width, rng.uniform(0, 0.7) * height
            box = [x, y, x + rng.uniform(0.05, 0.3) * width, y + rng.uniform(0.05, 0.3) * height]
            return written([[float(round(value)) for value in box]], box_format == TOKENS)

        stopped += report(box_format, blind).stops
    assert stopped <= 2


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_a_model_that_is_half_right_in_its_own_frame_is_not_stopped(box_format):
    for trial in range(200):
        rng = random.Random(trial)

        def half_right(asked, frame, rng=rng):
            x0, y0, x1, y1 = asked.boxes_xyxy_px[0]
            dx, dy = (x1 - x0) * rng.uniform(-0.4, 0.4), (y1 - y0) * rng.uniform(-0.4, 0.4)
            box = (x0 + dx, y0 + dy, x1 + dx, y1 + dy)
            return written([in_frame(box, FRAME_KIND[box_format], "xy", frame)], box_format == TOKENS)

        assert report(box_format, half_right).verdict == "fits"


def test_frames_that_coincide_stop_nothing():
    asked = Sample("k", "", None, 1000, 1000, "it", ((100.0, 100.0, 400.0, 300.0),))
    frame = Frame(RELATIVE_1000, 1000, 1000, 1000, 1000)
    look = look_at(Completion("[100, 100, 400, 300]", "json_relative_1000", frame), asked)
    found = FrameReport((look,) * 8, "json_relative_1000", True)
    assert found.means[:3] == [1.0, 1.0, 1.0] and found.best == found.own and found.verdict == "fits"


@pytest.mark.parametrize("written_in, is_told", [(RESIZED_PX, True), (RELATIVE_1000, False)])
def test_frames_that_nearly_coincide_are_told_and_stop_nothing(written_in, is_told):
    """960 resized pixels are 960 or 1000 units: numbers of one frame read in the other are 4 % off."""
    looks = []
    for number in range(8):
        rng = random.Random(number)
        x, y = rng.uniform(100, 500), rng.uniform(100, 500)
        asked = Sample(f"k{number}", "", None, 960, 960, "it", ((x, y, x + 200, y + 250),))
        frame = Frame(RELATIVE_1000, 960, 960, 960, 960)
        text = written([in_frame(asked.boxes_xyxy_px[0], written_in, "xy", frame)], False)
        looks.append(look_at(Completion(text, "json_relative_1000", frame), asked))
    found = FrameReport(tuple(looks), "json_relative_1000", True)
    assert found.verdict == "fits" and not found.stops
    assert ("fits better as pixels of the resized image" in found.message()) == is_told


def test_label_noise_does_not_count():
    clean = sample(0)
    noisy = add_noise(clean, LabelNoise(1.0))
    assert iou(noisy.boxes_xyxy_px[0], clean.boxes_xyxy_px[0]) == 0 and true_boxes(noisy) == true_boxes(clean)


def known(stream: list[Sample], count: int, dp_size: int) -> list[list[str]]:
    """Keys of each rank's known samples, where the global batches are ``stream`` in parts of 6."""
    ranks = Exchange(dp_size)

    def work(rank: int) -> list[str]:
        batches = iter([stream[start:start + 6][rank::dp_size] for start in range(0, len(stream), 6)])
        return [sample.key for sample in known_samples(lambda: next(batches), count, ranks.context(rank))]

    return in_threads(list(range(dp_size)), work)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_ranks_share_the_first_samples_whose_boxes_are_known(dp_size):
    def of_task(number: int) -> Sample:
        task = ("rec", "classification", "detection", "point")[number % 4]
        return sample(number, task, 0 if task == "classification" or number == 2 else 1)

    found = known([of_task(number) for number in range(48)], 8, dp_size)
    assert sorted(key for part in found for key in part) == sorted(f"k{n}" for n in (0, 3, 4, 6, 7, 8, 10, 11))
    few = known([sample(number, "classification", 0) for number in range(48)], 8, dp_size)
    assert few == [[] for _ in range(dp_size)], "it does not look for ever"


def test_a_broken_record_is_told():
    def broken() -> list[Sample]:
        raise ValueError("s.tar: sample 'a': broken image")

    with pytest.raises(BadData, match="broken image"):
        known_samples(broken, 4, Exchange(1).context(0))
