"""The whole way of every box of real data sets: annotations -> shard -> the real resize -> answer text -> tokens ->
text -> parsed -> original pixels. No corner moves by more than half a unit of the family's frame."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megavg.data.shards import PromptSource, iterate_all
from megavg.models.processor import Processor
from megavg.ops.answer_text import class_name, format_answer, normal_name
from megavg.ops.box_text import parse_boxes
from megavg.ops.boxes import center, contains
from megavg.ops.point_text import parse_points
from megavg.protocols.sample import RELATIVE_1000, Frame, Sample

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ROOT / "examples" / "data" / "webdocs_gui" / "annotations.jsonl"
CARDS = ROOT.parent / "shared" / "data" / "playing_cards" / "annotations.jsonl"
FORMATS = {"qwen2_vl": "tokens_relative_1000", "qwen2_5_vl": "json_resized_px", "qwen3_vl": "json_relative_1000"}
LIMITS = (3136, 401408)  # pixels of a resized picture: as small and as large as in a training, so that all are resized


def rows_of(annotations: Path) -> list[dict]:
    if not annotations.is_file():
        pytest.skip(f"{annotations} is not there: the data set is not carried in the repository")
    return [json.loads(line) for line in annotations.read_text().splitlines()]


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory):
    """``shards_of(annotations, *options)`` -> folder of the shards that the command line makes of them."""
    made = {}

    def make(annotations: Path, *options: str) -> str:
        rows_of(annotations)
        if (annotations, options) not in made:
            out = tmp_path_factory.mktemp("shards") / "set"
            command = [sys.executable, "tools/make_shards.py", "--format", "jsonl", "--annotations", str(annotations),
                       "--out", str(out), *options]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr
            made[annotations, options] = str(out)
        return made[annotations, options]

    return make


@pytest.fixture(scope="module", params=FORMATS)
def processor(request, checkpoints) -> Processor:
    return Processor.from_pretrained(checkpoints(request.param), FORMATS[request.param], *LIMITS)


class Frames:
    """The frame of each picture as a prompt of it has it; every picture is resized once."""

    def __init__(self, processor: Processor):
        self.processor, self._found = processor, {}

    def of(self, sample: Sample) -> Frame:
        if sample.meta["image"] not in self._found:
            prompt = self.processor.encode_prompt(sample.image, "where?")
            patch = self.processor.image_processor.patch_size
            (_, rows, columns), = prompt.image_grid_thw
            assert (prompt.frame.resized_width, prompt.frame.resized_height) == (columns * patch, rows * patch)
            assert (prompt.frame.original_width, prompt.frame.original_height) == sample.image.size
            assert prompt.pixel_values.shape[0] == rows * columns
            self._found[sample.meta["image"]] = prompt.frame
        return self._found[sample.meta["image"]]


@pytest.fixture(scope="module")
def frames(processor) -> Frames:
    return Frames(processor)


def as_answered(sample: Sample, frame: Frame, processor: Processor) -> str:
    """The text that a model which answers rightly would give back, through its tokens."""
    ids = processor.encode_answer(format_answer(sample, frame, processor.box_format))
    return processor.decode(ids)


def check_corners(found, truth, frame: Frame) -> None:
    """Half a unit of the frame, and half a pixel of the resized picture where its sides are at most 1000 pixels."""
    sides = (frame.original_width, frame.original_height)
    for i in range(4):
        side, resized = sides[i % 2], (frame.resized_width, frame.resized_height)[i % 2]
        shift = abs(found[i] - truth[i]) / side  # as a share of the picture's side
        assert shift * (1000 if frame.kind == RELATIVE_1000 else resized) <= 0.5 + 1e-6
        assert resized > 1000 or shift * resized <= 0.5 + 1e-6


def boxes_of(rows: list[dict], with_expression: bool) -> Counter:
    """(picture, box) of every object of the annotations, once for each expression where these are asked for."""
    found: Counter = Counter()
    for row in rows:
        for thing in row["objects"]:
            number = len(thing.get("expressions", [thing["expression"]] if "expression" in thing else []))
            found[row["image"], tuple(map(float, thing["bbox"]))] += number if with_expression else 1
    return +found


def test_every_element_of_the_screens(shards_of, processor, frames):
    """As a box, and as a point in it."""
    seen = Counter()
    for sample in iterate_all(shards_of(SCREENS)):
        truth, = sample.boxes_xyxy_px
        seen[sample.meta["image"], truth] += 1
        frame = frames.of(sample)
        answer = parse_boxes(as_answered(sample, frame, processor), frame, processor.box_format)
        assert answer.reason == "ok" and len(answer.boxes_px) == 1
        check_corners(answer.boxes_px[0], truth, frame)
        as_point = as_answered(dataclasses.replace(sample, task="point"), frame, processor)
        answer = parse_points(as_point, frame, processor.box_format)
        assert answer.reason == "ok" and len(answer.points_px) == 1 and contains(truth, answer.points_px[0])
        check_corners((*answer.points_px[0], *answer.points_px[0]), (*center(truth), *center(truth)), frame)
    assert seen == boxes_of(rows_of(SCREENS), with_expression=True) and sum(seen.values()) > 500


def test_every_card(shards_of, processor, frames):
    folder, seen, rows = shards_of(CARDS, "--task", "detection"), Counter(), rows_of(CARDS)
    for sample in iterate_all(folder):
        seen.update((sample.meta["image"], box) for box in sample.boxes_xyxy_px)
        frame = frames.of(sample)
        answer = parse_boxes(as_answered(sample, frame, processor), frame, processor.box_format)
        assert answer.reason == "ok" and answer.labels == sample.labels
        for found, truth in zip(answer.boxes_px, sample.boxes_xyxy_px, strict=True):
            check_corners(found, truth, frame)
    assert seen == boxes_of(rows, with_expression=False) and sum(seen.values()) == 670


def test_the_name_of_a_card(shards_of, processor, frames):
    folder, names = shards_of(CARDS, "--task", "classification"), Counter()
    for sample in iterate_all(folder):
        answer = as_answered(sample, frames.of(sample), processor)
        assert class_name(answer) == normal_name(sample.labels[0])
        names.update(sample.labels)
    assert set(names) == {"king", "queen", "jack", "ten", "nine", "ace"}


def test_a_training_source_gives_the_same_samples(shards_of):
    folder = shards_of(SCREENS)

    def contents(sample: Sample) -> tuple:
        return sample.key, sample.expression, sample.boxes_xyxy_px, sample.image.size

    with PromptSource(folder, 64, seed=3, infinite=False) as source:
        drawn = [contents(sample) for batch in source for sample in batch]
    assert sorted(drawn) == sorted(map(contents, iterate_all(folder)))
