"""Read a folder of pictures with one JSONL of annotations: one line per picture.

A line is ``{"image", "width", "height", "split"?, "objects": [{"bbox": [x0, y0, x1, y1], "label"?, "expression" or
"expressions"?, ...}], ...}``: the image path is relative to the file, the box in pixels of the stored image, x1 and y1
exclusive. Other entries of the line and of the object go to ``Sample.meta``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Iterator

from megavg.data.readers.base import Draft, ImageFile, PictureFolder, broken
from megavg.data.readers.coco import CLIP_PX
from megavg.data.readers.files import check_choice, existing_folder, json_lines
from megavg.data.readers.objects import Picture, Thing, check_task, chosen_classes, picture_drafts
from megavg.data.sample import RECORD_FIELDS

_ROW_FIELDS = (("image", str), ("width", int), ("height", int), ("objects", list))
_USED = ("bbox", "expression", "expressions", "objects", *RECORD_FIELDS)


@dataclass(frozen=True)
class _Options:
    task: str
    with_labels: bool
    classes: tuple[str, ...]
    keep_empty: bool
    pictures: PictureFolder
    clip: float


def read(annotations: str, split: str | None = None, task: str = "rec", expression: str = "given",
         classes: list[str] | None = None, keep_empty: bool = False, image_root: str | None = None,
         clip: float = CLIP_PX, allow_outside: bool = False) -> Iterator[Draft]:
    """Yield the samples of a JSONL file.

    Task "rec" and "point": one sample per expression of an object; an object without one is passed over. Tasks
    "detection" and "classification" go by the objects' labels, see ``megavg.data.readers.objects``.

    Args:
        annotations: the JSONL file.
        split: take only lines whose "split" equals this; None takes all.
        task: "rec", "point", "detection" or "classification".
        expression: "given", or "label": where an object has no expression but a label that occurs once in the
            picture, the expression is "the <label>".
        classes: labels asked for; None: all labels in the file, whatever the split.
        keep_empty: with task=detection, keep pictures without any of the classes; the right answer is "None".
        image_root: the folder that image paths are relative to; None: that of the file.
        clip: boxes that leave the picture by at most so many pixels are cut at its edge.
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: the file or folder is missing, no line has ``split``, an unknown class or task.
    """
    check_task(task)
    check_choice(expression, ("given", "label"), "expression")
    folder = os.path.dirname(annotations) if image_root is None else existing_folder(image_root, "image_root",
                                                                                     "the pictures")
    by_label = task in ("detection", "classification") or expression == "label"
    asked = _asked(annotations, classes) if by_label else ()
    options = _Options(task, expression == "label", asked, keep_empty, PictureFolder(folder, allow_outside),
                       clip)
    splits: set[str] = set()
    for number, row, problem in json_lines(annotations):
        if isinstance(row, dict):
            splits.add(str(row.get("split")))
            if split is not None and row.get("split") != split:  # its faults are no concern of this split
                continue
        fault = ("bad json", problem) if problem else _fault(row)
        if fault:
            yield broken(f"{annotations}: line {number}", _key("line", number, 0, 0), *fault)
        else:
            yield from _row_drafts(row, f"{annotations}: line {number}", number, options)
    if split is not None and split not in splits:
        raise ValueError(f"{annotations}: no line has split {split!r}; the file has {sorted(splits)}")


def _asked(annotations: str, classes: list[str] | None) -> tuple[str, ...]:
    """The classes asked for: those given, or every label of the file."""
    found: set[str] = set()
    has_faults = False
    for _, row, problem in json_lines(annotations):
        things = row["objects"] if not problem and not _fault(row) else None
        has_faults |= things is None or any(_thing_fault(thing, True) is not None for thing in things)
        found |= {thing["label"] for thing in things or () if _thing_fault(thing, True) is None}
    # Where no line could be read, the faults say more than that there are no classes.
    return () if has_faults and not found else chosen_classes(classes, sorted(found), annotations)


def _fault(row: Any) -> tuple[str, str] | None:
    """Why a line cannot be used: (reason, detail), or None."""
    if not isinstance(row, dict):
        return "bad json", f"expected an object, got {type(row).__name__}"
    for name, kind in _ROW_FIELDS:
        if not isinstance(row.get(name), kind):
            return "missing field", f"expected {name!r} of type {kind.__name__}, got {row.get(name)!r}"
    return None


def _row_drafts(row: dict[str, Any], where: str, number: int, options: _Options) -> Iterator[Draft]:
    image = options.pictures.file(row["image"])
    known = {"source": row.get("source", ""), **_meta(row), "image": row["image"], "width": row["width"],
             "height": row["height"]}
    by_picture = options.task in ("detection", "classification")
    things = []
    for place, thing in enumerate(row["objects"]):
        fault = _thing_fault(thing, by_picture)
        if fault:
            yield broken(f"{where} object {place}", _key(row["image"], number, place, 0), *fault)
            if by_picture:  # an answer that lacks an object would be wrong
                return
            continue
        # An object with expressions of its own needs no question by its label, but it counts.
        has_own = not by_picture and ("expression" in thing or "expressions" in thing)
        things.append(Thing(thing["bbox"], thing.get("label", ""), has_own,
                            {name: value for name, value in _meta(thing).items() if name != "label"}))
        if has_own:
            yield from _expression_drafts(thing, place, known, image, where, number, options)
    if by_picture or options.with_labels:
        picture = Picture(where, (row["image"], number), image, things, known)
        yield from picture_drafts(picture, options.task, options.classes, options.keep_empty, options.clip)


def _thing_fault(thing: Any, needs_label: bool) -> tuple[str, str] | None:
    if not isinstance(thing, dict) or "bbox" not in thing:
        return "missing field", f"expected an object with a 'bbox', got {thing!r}"
    label = thing.get("label", "")
    if not isinstance(label, str) or needs_label and not label:
        return "bad labels", f"expected a 'label' that is a text, got {thing.get('label')!r}"
    return None


def _expression_drafts(thing: dict[str, Any], place: int, known: dict[str, Any], image: ImageFile, where: str,
                       number: int, options: _Options) -> Iterator[Draft]:
    where = f"{where} object {place}"
    expressions = thing.get("expressions", [thing["expression"]] if "expression" in thing else [])
    if not isinstance(expressions, list):
        yield broken(where, _key(known["image"], number, place, 0), "bad json",
                     f"'expressions' must be a list of texts, got {expressions!r}")
        return
    asked = {"task": options.task} if options.task != "rec" else {}
    for turn, expression in enumerate(expressions):
        yield Draft(where, _key(known["image"], number, place, turn), image,
                    {**known, **_meta(thing), **asked, "expression": expression, "boxes_xyxy_px": [thing["bbox"]]},
                    clip_px=options.clip)


def _meta(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name not in _USED}


def _key(image: str, number: int, place: int, turn: int) -> str:
    """A key that shards accept: the picture's name, then line, object and expression, which make it unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(os.path.basename(image))[0]).lstrip("_")[:50]
    return f"{stem or 'image'}-{number:06d}-{place:03d}-{turn}"
