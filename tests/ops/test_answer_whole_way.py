"""The whole way of an answer: true box, the real resize, text, tokens, text, parser, original pixels."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from megavg.models.processor import Processor
from megavg.ops.answer_text import class_name, format_answer, says_none
from megavg.ops.box_text import parse_boxes
from megavg.ops.boxes import contains
from megavg.ops.point_text import parse_points
from megavg.protocols.sample import RESIZED_PX, Frame, Sample

FORMATS = {"qwen2_vl": "tokens_relative_1000", "qwen2_5_vl": "json_resized_px", "qwen3_vl": "json_relative_1000"}
SIZES = ((60, 90), (333, 127), (84, 1000), (640, 480))  # kept, shrunk and stretched by the resize
LABELS = ("king", "dame de cœur", "框")


def through_tokens(processor: Processor, sample: Sample, frame: Frame) -> str:
    ids = processor.encode_answer(format_answer(sample, frame, processor.box_format))
    return processor.decode(ids)


@pytest.mark.parametrize("family", FORMATS)
def test_the_true_answer_comes_back_within_half_a_pixel_of_the_resized_image(checkpoints, family):
    processor = Processor.from_pretrained(checkpoints(family), FORMATS[family])
    rng = random.Random(family)
    for width, height in SIZES:
        frame = processor.encode_prompt(Image.new("RGB", (width, height)), "where?").frame
        assert (frame.original_width, frame.original_height) == (width, height)
        assert (frame.resized_width, frame.resized_height) != (width, height)
        unit_px = width / frame.extent[0], height / frame.extent[1]
        for _ in range(50):
            boxes = []
            for _ in range(rng.randint(1, 3)):
                corner = [rng.uniform(0, side - 2 * unit) for side, unit in zip((width, height), unit_px)]
                far = [rng.uniform(low + unit, side) for low, unit, side in zip(corner, unit_px, (width, height))]
                boxes.append((*corner, *far))
            for task in ("rec", "detection"):
                labels = tuple(rng.choice(LABELS) for _ in boxes) if task == "detection" else ()
                sample = Sample("k", "", None, width, height, "it", tuple(boxes), {}, task, labels)
                answer = parse_boxes(through_tokens(processor, sample, frame), frame, processor.box_format)
                assert answer.reason == "ok" and len(answer.boxes_px) == len(boxes)
                assert answer.labels == (labels or (None,) * len(boxes))
                assert_close(boxes, answer.boxes_px, frame)
            sample = Sample("k", "", None, width, height, "it", tuple(boxes), {}, "point")
            points = parse_points(through_tokens(processor, sample, frame), frame, processor.box_format).points_px
            assert len(points) == 1 and contains(boxes[0], points[0])
        sample = Sample("k", "", None, width, height, "cards", (), {}, "detection")
        assert says_none(through_tokens(processor, sample, frame))
        for label in LABELS:
            sample = Sample("k", "", None, width, height, "card", (), {}, "classification", (label,))
            assert class_name(through_tokens(processor, sample, frame)) == label


def assert_close(boxes, read_back, frame: Frame) -> None:
    """Half a pixel of the resized image, which no side here is so long as to break for frames of 1000 units."""
    scale = frame.resized_width / frame.original_width, frame.resized_height / frame.original_height
    bound = [0.5 if frame.kind == RESIZED_PX else side / 2000 for side in (frame.resized_width, frame.resized_height)]
    assert max(bound) <= 0.5
    for box, other in zip(boxes, read_back):
        for i in range(4):
            assert abs(box[i] - other[i]) * scale[i % 2] <= bound[i % 2] * (1 + 1e-6)
