"""Read a folder of pictures with one JSONL of annotations: one line per picture."""

from __future__ import annotations

import json
import os
import re
from typing import Any, Iterator

from megavg.data.sample import SampleError, decode_image, sample_from_fields
from megavg.protocols.sample import Sample


def read_jsonl(annotations: str, split: str | None = None) -> Iterator[Sample]:
    """Yield one sample per expression of the pictures listed in the file ``annotations``.

    A line is ``{"image", "width", "height", "split"?, "objects": [{"bbox": [x0, y0, x1, y1], "expression" or
    "expressions", ...}], ...}``: the image path is relative to the file, the box in pixels of the stored image. An
    object without an expression is passed over. Other entries of the line and the object go to ``Sample.meta``. A
    picture is decoded once, and only if a sample needs it.

    Args:
        split: take only lines whose "split" equals this; None takes all.

    Raises:
        SampleError: naming the file, the line and the object, at the first thing that is wrong.
        ValueError: when no line has ``split``.
    """
    splits: set[str] = set()
    try:
        with open(annotations, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = _row(line, annotations, f"line {number}")
                splits.add(str(row.get("split")))
                if split is None or row.get("split") == split:
                    yield from _row_samples(row, annotations, number)
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read annotations {annotations!r}: {error}") from error
    if split is not None and split not in splits:
        raise ValueError(f"{annotations}: no line has split {split!r}; the file has {sorted(splits)}")


def _row(line: str, annotations: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SampleError(annotations, where, "bad json", str(error)) from error
    if not isinstance(row, dict):
        raise SampleError(annotations, where, "bad json", f"expected an object, got {type(row).__name__}")
    for name, kind in (("image", str), ("width", int), ("height", int), ("objects", list)):
        if not isinstance(row.get(name), kind):
            raise SampleError(annotations, where, "missing field",
                              f"expected {name!r} of type {kind.__name__}, got {row.get(name)!r}")
    return row


_USED = ("bbox", "expression", "expressions")


def _row_samples(row: dict[str, Any], annotations: str, number: int) -> Iterator[Sample]:
    image = None
    for place, thing in enumerate(row["objects"]):
        where = f"line {number} object {place}"
        if not isinstance(thing, dict) or "bbox" not in thing:
            raise SampleError(annotations, where, "missing field", f"expected an object with a 'bbox', got {thing!r}")
        for turn, expression in enumerate(_expressions(thing, annotations, where)):
            fields = {"source": row.get("source", ""), "image": row["image"],
                      **{name: value for name, value in thing.items() if name not in _USED},
                      "id": _key(row["image"], number, place, turn), "width": row["width"], "height": row["height"],
                      "expression": expression, "boxes_xyxy_px": [thing["bbox"]]}
            if "split" in row:
                fields["split"] = row["split"]
            if image is None:
                image = _load(row, annotations, f"line {number}")
            yield sample_from_fields(fields, annotations, where, image)


def _expressions(thing: dict[str, Any], annotations: str, where: str) -> list[str]:
    found = thing.get("expressions", [thing["expression"]] if "expression" in thing else [])
    if not isinstance(found, list):
        raise SampleError(annotations, where, "bad json", f"'expressions' must be a list of texts, got {found!r}")
    return found


def _key(image: str, number: int, place: int, turn: int) -> str:
    """A key that shards accept: the picture's name, then line, object and expression, which make it unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(os.path.basename(image))[0]).lstrip("_")[:50]
    return f"{stem or 'image'}-{number:06d}-{place:03d}-{turn}"


def _load(row: dict[str, Any], annotations: str, where: str):
    path = os.path.join(os.path.dirname(annotations), row["image"])
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise SampleError(annotations, where, "missing image", f"{path}: {error.strerror}") from error
    return decode_image(data, row["width"], row["height"], annotations, f"{where}: {path}")
