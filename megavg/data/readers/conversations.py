"""Read conversations whose answers are boxes: VLM-R1's REC and OVD files, and data in LLaVA's shape.

One row of a ``.jsonl`` file, or of a ``.json`` file that holds a list, is one of

- ``{"image", "problem", "solution": [x0, y0, x1, y1], "normal_caption"?, "width"?, "height"?, ...}``: VLM-R1's
  rec_jsons_processed (om-ai-lab/VLM-R1, thread 11); its boxes are pixels, those of the InternVL edition thousandths;
- ``{"id", "image", "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}, ...]}``:
  VLM-R1's jsonl (its README and grpo_jsonl.py) and LLaVA's; several pairs of turns are several samples;
- ``{"images": [...], "messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}``: LLaMA-Factory's.

An answer is a list of four numbers or of such lists, objects with "bbox_2d" (or "bbox") and "label", each also as
JSON text, perhaps inside <answer> or a code fence; or Qwen2-VL's (x0,y0),(x1,y1). Nothing is guessed about the frame:
it has to be named, as the same numbers are written in several (see ``megavg.data.readers.frames``).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Iterator

from megavg.data.readers.answers import boxes_of, classes_of
from megavg.data.readers.base import Draft, PictureFolder, broken, key_from, key_word
from megavg.data.readers.coco import CLIP_PX
from megavg.data.readers.files import check_choice, existing_folder, rows_of
from megavg.data.readers.frames import check_frame

REC_QUESTION = (r"Please provide the bounding box coordinates? of the region this sentence describes: *"
                r"(?:<ref>)?(?P<expression>[^\n]+?)(?:</ref>)?\.?")
OVD_QUESTION = (r"(?s:.*?)Please carefully check the image and detect the following objects: *"
                r"(?P<expression>\[[^\]]*\]|\{[^}]*\}|(?:\n *- [^\n]+)+|[^\n]+?)\.?(?:\s+(?:Output|First|If) (?s:.*))?")
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class _Options:
    frame: str
    task: str
    question: re.Pattern
    skip_other_turns: bool
    pictures: PictureFolder
    clip: float


def read(annotations: str, frame: str, image_root: str | None = None, task: str = "rec", question: str | None = None,
         skip_other_turns: bool = False, clip: float = CLIP_PX, allow_outside: bool = False) -> Iterator[Draft]:
    """Yield one sample per question and answer.

    Args:
        annotations: the .jsonl file, or a .json file that holds a list.
        frame: what the boxes are counted in: pixels (VLM-R1), relative_1, relative_1000 (VLM-R1 for InternVL) or
            relative_1_square (LLaVA-1.5).
        image_root: the folder that image paths are relative to; None: that of the file.
        task: "rec" or "point" (the boxes of the answer), or "detection" (every box with a label, or none).
        question: a regular expression that the whole question matches, with a group "expression"; None: the question
            of VLM-R1 and LLaVA ("Please provide the bounding box coordinate of the region this sentence describes:
            ..."), for detection that of VLM-R1 ("... detect the following objects: ...").
        skip_other_turns: pass over questions that do not match, and rows without a picture. By default each of them is
            an error.
        clip: boxes that leave the picture by at most so many pixels (with relative_1_square also those that do so by
            what its two decimals round away) are cut at its edge.
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: the file or folder is missing, no list of rows, an unknown frame or task, a bad ``question``.
    """
    check_frame(frame)
    check_choice(task, ("rec", "point", "detection"), "task")
    folder = os.path.dirname(annotations) if image_root is None else existing_folder(image_root, "image_root",
                                                                                     "the pictures")
    pattern = _pattern(question or (OVD_QUESTION if task == "detection" else REC_QUESTION))
    options = _Options(frame, task, pattern, skip_other_turns, PictureFolder(folder, allow_outside), clip)
    for place, number, row, problem in rows_of(annotations):
        where = f"{annotations}: {place}"
        if skip_other_turns and isinstance(row, dict) and all(image is None for image in _images(row)):
            continue
        fault = ("bad json", problem) if problem else _fault(row)
        if fault:
            yield broken(where, key_from("row", number), *fault)
        else:
            yield from _row_drafts(row, where, number, options)


def _pattern(question: str) -> re.Pattern:
    try:
        pattern = re.compile(question)
    except re.error as error:
        raise ValueError(f"question={question!r} is no regular expression: {error}") from error
    if "expression" not in pattern.groupindex:
        raise ValueError(f"question={question!r} has no group (?P<expression>...) for what to find")
    return pattern


def _fault(row: Any) -> tuple[str, str] | None:
    """Why a row cannot be used: (reason, detail), or None."""
    if not isinstance(row, dict):
        return "bad json", f"expected an object, got {type(row).__name__}"
    images = _images(row)
    if len(images) != 1 or not isinstance(images[0], str):
        return "missing image", f"expected one picture in 'image', got {row.get('image', row.get('images'))!r}"
    if not isinstance(row.get("conversations", row.get("messages")), list) and "solution" not in row:
        return "missing field", f"expected 'conversations', 'messages' or 'problem' and 'solution', got {sorted(row)}"
    return None


def _images(row: dict[str, Any]) -> list[Any]:
    found = row.get("image", row.get("images", row.get("image_path")))
    return found if isinstance(found, list) else [found]


def _pairs(row: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(question, answer) of each pair of turns; None where a turn is missing. A system turn is no question."""
    turns = row.get("conversations", row.get("messages"))
    if turns is None:
        yield row.get("problem"), row["solution"]
        return
    asked = None
    for turn in turns:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        said = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if speaker in _MODEL:
            yield asked, said
            asked = None
        elif speaker in _HUMAN:
            if asked is not None:
                yield asked, None
            asked = said
        elif speaker != "system":
            yield None, None
    if asked is not None:
        yield asked, None


def _row_drafts(row: dict[str, Any], where: str, number: int, options: _Options) -> Iterator[Draft]:
    image = _images(row)[0]
    known = {"image": image, "row_id": row.get("id", number)}
    if isinstance(row.get("dataset_name"), str):
        known["dataset"] = row["dataset_name"]
    known.update({side: row[side] for side in ("width", "height") if isinstance(row.get(side), int)})
    for turn, (asked, answer) in enumerate(_pairs(row)):
        spot, key = f"{where} turn {turn}", key_from(key_word(image), number, turn)
        if not isinstance(asked, str) or answer is None:
            yield broken(spot, key, "missing field",
                         f"expected a question and its answer, got {asked!r} and {answer!r}")
            continue
        match = options.question.fullmatch(asked.replace("<image>", "").strip())
        caption = None if "conversations" in row or "messages" in row else row.get("normal_caption")
        if caption is not None and not isinstance(caption, str):
            yield broken(spot, key, "missing field", f"'normal_caption' must be a text, got {caption!r}")
            continue
        if match is None and not caption:
            if not options.skip_other_turns:
                yield broken(spot, key, "bad json", f"the question {asked!r} does not match "
                             f"{options.question.pattern!r}; name a pattern with question, or leave such turns out "
                             "with skip_other_turns")
            continue
        fields, fault = _answer_fields(caption or match["expression"], answer, options)
        if fault:
            yield broken(spot, key, *fault)
        else:
            yield Draft(spot, key, options.pictures.file(image), {**known, "source_frame": options.frame, **fields},
                        box_frame=options.frame, clip_px=options.clip)


def _answer_fields(expression: str, answer: Any, options: _Options) -> tuple[dict[str, Any], Any]:
    """(fields, None) of a question with its answer, or ({}, (reason, detail))."""
    found = boxes_of(answer)
    if found is None:
        return {}, ("bad json", f"no box in the answer {answer!r}, or brackets whose numbers are no box")
    fields: dict[str, Any] = {"expression": expression.strip(), "boxes_xyxy_px": [box for box, _ in found]}
    if options.task != "rec":
        fields["task"] = options.task
    if options.task == "detection":
        if not all(label for _, label in found):
            return {}, ("bad labels", f"a detection needs a label for each box, got {answer!r}")
        fields.update(expression=classes_of(expression), labels=[label for _, label in found])
    return fields, None
