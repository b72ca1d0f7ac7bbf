"""What supervised fine-tuning learns: the true answer of every task, in the frame that the run reads."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from megavg.data.prompts import Prompts
from megavg.models.processor import Processor
from megavg.ops.answer_text import class_name
from megavg.ops.box_text import parse_boxes
from megavg.ops.boxes import contains, iou
from megavg.ops.point_text import parse_points
from megavg.ops.strict_text import strict_format
from megavg.protocols.sample import RELATIVE_1000, RESIZED_PX, Sample
from megavg.trainer.prompt_log import PromptLog
from megavg.trainer.rollouts import completions, encode, written_answers

FORMATS = {"qwen2_vl": "tokens_relative_1000", "qwen2_5_vl": "json_resized_px", "qwen3_vl": "json_relative_1000"}
BOX = (40.0, 30.0, 160.0, 90.0)


def sample(task: str, **meta) -> Sample:
    boxes, labels = {"classification": ((), ("king",)), "detection": ((BOX, (10.0, 5.0, 60.0, 25.0)), ("king", "ace"))
                     }.get(task, ((BOX,), ()))
    return Sample(f"{task}-1", "s.tar", Image.new("RGB", (300, 200), "white"), 300, 200, "king, ace", boxes, meta, task,
                  labels)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", FORMATS)
def test_every_task_reads_back(checkpoints, family, thinking):
    processor = Processor.from_pretrained(checkpoints(family), FORMATS[family])
    samples = [sample(task, thought="It is in the middle.") for task in ("rec", "point", "detection", "classification")]
    prompts = encode(samples, processor, Prompts(family, thinking=thinking).question)
    found = completions(written_answers(samples, prompts, processor, thinking), processor)
    for asked, completion in zip(samples, found):
        text, frame, box_format = completion.text, completion.frame, completion.box_format
        assert text.startswith("<think>It is in the middle.</think><answer>") == thinking
        assert strict_format(text, box_format, thinking=thinking, task=asked.task) is None
        if asked.task == "classification":
            assert class_name(text) == "king"
        elif asked.task == "point":
            assert contains(BOX, parse_points(text, frame, box_format).points_px[0])
        else:
            answer = parse_boxes(text, frame, box_format)
            assert all(iou(a, b) > 0.9 for a, b in zip(answer.boxes_px, asked.boxes_xyxy_px, strict=True))
            assert asked.task == "rec" or answer.labels == asked.labels


@pytest.mark.parametrize("thought", [None, "", "  ", 5])
def test_a_missing_thought_names_the_sample(checkpoints, thought):
    processor = Processor.from_pretrained(checkpoints("qwen3_vl"), "json_relative_1000")
    asked = [sample("rec", thought=thought)]
    prompts = encode(asked, processor, Prompts("qwen3_vl", thinking=True).question)
    with pytest.raises(ValueError, match="s.tar: sample 'rec-1' has no \"thought\".*data.thinking=false"):
        written_answers(asked, prompts, processor, thinking=True)
    assert written_answers(asked, prompts, processor).responses


@pytest.mark.parametrize("box_format, kind", [("json_relative_1000", RELATIVE_1000), ("json_resized_px", RESIZED_PX),
                                              ("tokens_relative_1000", RELATIVE_1000)])
def test_another_box_format_changes_prompt_target_and_reading_together(checkpoints, box_format, kind):
    processor = Processor.from_pretrained(checkpoints("qwen2_5_vl"), box_format)
    asked = [sample("rec")]
    prompts = encode(asked, processor, Prompts("qwen2_5_vl").question)
    completion, = completions(written_answers(asked, prompts, processor), processor)
    assert prompts[0].frame.kind == completion.frame.kind == kind and completion.box_format == box_format
    assert ("<|box_start|>" in completion.text) == (box_format == "tokens_relative_1000")
    assert iou(parse_boxes(completion.text, completion.frame, box_format).boxes_px[0], BOX) > 0.95


def test_each_tasks_prompt_is_told_once(checkpoints):
    processor = Processor.from_pretrained(checkpoints("qwen3_vl"), "json_relative_1000")
    lines: list[str] = []
    log = PromptLog(Prompts("qwen3_vl", prompts={"point": "Click {expression}."}), processor, lines.append)
    log.tell([sample("rec"), dataclasses.replace(sample("rec"), key="other")])
    log.tell([sample("point"), sample("rec"), sample("point")])
    assert [line.split(":")[0] for line in lines] == ["prompt of rec (qwen3_vl.yaml)",
                                                      "the first prompt as the model reads it, rec-1",
                                                      "prompt of point (data.prompts)"]
    assert "Locate king, ace, report the bbox coordinates" in lines[1] and "<|im_start|>assistant" in lines[1]
    assert lines[2].endswith("'Click {expression}.'")
