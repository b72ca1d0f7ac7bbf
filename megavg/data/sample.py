"""Turn a shard's record into a ``Sample`` and back, and refuse a record that would teach the model something wrong.

A record is one image member and one JSON member of a webdataset tar that share a key::

    <key>.png | .jpg | .jpeg | .webp
    <key>.json   {"id": "...", "width": 640, "height": 480, "expression": "the red circle",
                  "boxes_xyxy_px": [[x0, y0, x1, y1], ...], ...anything else: Sample.meta}

Records of another task than "rec" also hold "task" and, for detection and classification, "labels"
(``megavg.protocols.sample.Sample`` says which). A detection may hold no box, a classification holds none.

Boxes refer to the pixels AS STORED: an EXIF orientation is not applied, so a picture that a viewer shows rotated keeps
the width and height of its file. No one can tell whether boxes that were drawn in a viewer fit it, so building shards
refuses such pictures. Texts are what UTF-8 can hold; a lone surrogate ("\\ud800", which JSON may spell) is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from megavg.data.spans import Span
from megavg.ops.class_text import normal_name
from megavg.ops.text_parts import MAX_LABEL
from megavg.protocols.sample import TASKS, Box, Sample

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
RECORD_FIELDS = ("id", "width", "height", "expression", "boxes_xyxy_px", "task", "labels")
REQUIRED_FIELDS = RECORD_FIELDS[1:5]
REASONS = ("bad json", "missing field", "missing image", "empty box", "box outside image", "broken image",
           "size mismatch", "bad key", "torn shard", "control token", "extreme aspect", "no room for noise",
           "unknown task", "bad labels", "rotated picture", "duplicate key")

# webdataset cuts a member's name at its first dot, and a plain tar header holds 100 characters.
_KEY = re.compile(r"(?!__)[A-Za-z0-9_\-/]{1,92}")
_CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_MAX_ASPECT_RATIO = 200
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_ORIENTATION, _ROTATED = 0x0112, range(2, 9)  # the EXIF tag, and its values that a viewer turns or mirrors by
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class SampleError(ValueError):
    """A record that cannot be used: ``shard``, ``key``, ``reason`` (one of ``REASONS``, to count) and ``detail``."""

    def __init__(self, shard: str, key: str, reason: str, detail: str):
        super().__init__(shard, key, reason, detail)
        self.shard, self.key, self.reason, self.detail = shard, key, reason, detail

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.shard, self.key and f"sample {self.key!r}") if part)
        return f"{where}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class RawRecord:
    """The undecoded members of one sample: ``files`` maps a suffix ("png", "json") to bytes, or to where they lie.

    ``index`` counts the records of ``shard`` from 0, so (shard, index) names a record even where keys repeat.
    ``problem`` is the (reason, detail) of members that make no record; ``parse_record`` raises it.
    """

    shard: str
    key: str
    index: int
    files: dict[str, bytes | Span]
    problem: tuple[str, str] | None = None


def parse_record(record: RawRecord) -> Sample:
    """Read the JSON of ``record`` and check it; the image stays undecoded (``Sample.image`` is None).

    Raises:
        SampleError: no JSON or image member, a missing or ill-typed field, a box that is empty or outside, or the
            record's own ``problem``.
    """
    if record.problem is not None:
        raise SampleError(record.shard, record.key, *record.problem)
    if "json" not in record.files:
        raise SampleError(record.shard, record.key, "missing field",
                          f"no .json member, only {sorted(record.files)}")
    content = _content(record, "json")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(record.shard, record.key, "bad json", f"the .json member does not parse ({error})") from error
    if not isinstance(fields, dict):
        raise SampleError(record.shard, record.key, "bad json", f"expected an object, got {type(fields).__name__}")
    if _image_suffix(record) is None:
        raise SampleError(record.shard, record.key, "missing image",
                          f"expected a member ending in one of {IMAGE_SUFFIXES}, got {sorted(record.files)}")
    return sample_from_fields(fields, record.shard, record.key)


def sample_from_fields(fields: dict[str, Any], shard: str, key: str, image: Image.Image | None = None) -> Sample:
    """Build a checked ``Sample`` from the fields of a record; ``key`` stands in when the record has no "id".

    Raises:
        SampleError: naming ``shard`` and ``key``, when a field is missing, ill-typed or a box is wrong.
    """
    _check_texts(fields, shard, key)
    for name in REQUIRED_FIELDS:
        if name not in fields:
            raise SampleError(shard, key, "missing field", f"{name!r} is not among {sorted(fields)}")
    for name in ("width", "height"):
        size = fields[name]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise SampleError(shard, key, "bad json", f"{name} must be a whole number of pixels, got {size!r}")
    expression = fields["expression"]
    if not isinstance(expression, str) or not expression.strip():
        raise SampleError(shard, key, "missing field", f"expression must be a text, got {expression!r}")
    longer, shorter = max(fields["width"], fields["height"]), min(fields["width"], fields["height"])
    if longer > _MAX_ASPECT_RATIO * shorter:
        raise SampleError(shard, key, "extreme aspect", f"{fields['width']} x {fields['height']} is more than "
                          f"{_MAX_ASPECT_RATIO} to 1, which no Qwen-VL processor takes")
    task, labels = fields.get("task", "rec"), fields.get("labels", ())
    if task not in TASKS:
        raise SampleError(shard, key, "unknown task", f"task {task!r} is none of {', '.join(TASKS)}")
    boxes = check_boxes(fields["boxes_xyxy_px"], fields["width"], fields["height"], shard, key,
                        may_be_empty=task in ("detection", "classification"))
    check_labels(labels, task, len(boxes), shard, key)
    for text in (expression, *labels):
        if _CONTROL_TOKEN.search(text):
            raise SampleError(shard, key, "control token", f"{text!r} holds a token that would break the prompt")
    meta = {name: value for name, value in fields.items() if name not in RECORD_FIELDS}
    return Sample(str(fields.get("id", key)), shard, image, fields["width"], fields["height"], expression, boxes, meta,
                  task, tuple(labels))


def _check_texts(fields: dict[str, Any], shard: str, key: str) -> None:
    """Raise ``SampleError`` where UTF-8 cannot hold a text of ``fields``, at any depth: no tokenizer takes it."""
    try:
        _ENCODER.encode([fields, key]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError(shard, key, "bad json", f"a text holds {error.object[error.start:error.end]!r}, a part of a "
                          "character that was cut in two (a lone surrogate)") from error
    except (TypeError, ValueError, RecursionError):
        pass  # no JSON at all: record_json says so where the sample is written


def check_labels(labels: Any, task: str, num_boxes: int, shard: str, key: str) -> None:
    """Raise ``SampleError`` unless ``labels`` are the texts that ``task`` needs: a class per box, or right names.

    A label must be a name as :func:`megavg.ops.class_text.normal_name` takes it, of 1 to ``MAX_LABEL`` characters
    besides quotes around it and a final stop: no answer could match another.
    """
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise SampleError(shard, key, "bad labels", f"labels must be a list of texts, got {labels!r}")
    nameless = next((label for label in labels if not normal_name(label)), None)
    if nameless is not None:
        raise SampleError(shard, key, "bad labels", f"no answer can match the label {nameless[:80]!r} of "
                          f"{len(nameless)} characters: a name has 1 to {MAX_LABEL} besides quotes and a final stop; "
                          "rename the class")
    if task == "classification" and (num_boxes or not labels):
        raise SampleError(shard, key, "bad labels", f"a classification holds one or more labels and no box, got "
                          f"{len(labels)} labels and {num_boxes} boxes")
    expected = {"detection": num_boxes, "classification": len(labels)}.get(task, 0)
    if len(labels) != expected:
        raise SampleError(shard, key, "bad labels", f"task {task!r} with {num_boxes} boxes needs {expected} labels, "
                          f"got {len(labels)}")


def check_boxes(boxes: Any, width: int, height: int, shard: str, key: str,
                may_be_empty: bool = False) -> tuple[Box, ...]:
    """Return ``boxes`` as tuples of floats, each with x1 > x0 and y1 > y0 inside [0, width] x [0, height] pixels.

    Raises:
        SampleError: "missing field" (no box), "bad json" (not four finite numbers), "empty box", "box outside image".
    """
    if not isinstance(boxes, (list, tuple)) or not (boxes or may_be_empty):
        raise SampleError(shard, key, "missing field", f"boxes_xyxy_px must hold at least one box, got {boxes!r}")
    checked = []
    for box in boxes:
        numbers = [_finite(value) for value in box] if isinstance(box, (list, tuple)) else []
        if len(numbers) != 4 or None in numbers:
            raise SampleError(shard, key, "bad json",
                              f"a box is four finite numbers x0, y0, x1, y1 in pixels, got {box!r}")
        x0, y0, x1, y1 = numbers
        if x1 <= x0 or y1 <= y0:
            raise SampleError(shard, key, "empty box", f"expected x1 > x0 and y1 > y0, got {box!r}")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            raise SampleError(shard, key, "box outside image", f"{box!r} leaves the {width} x {height} image")
        checked.append((x0, y0, x1, y1))
    return tuple(checked)


def decode_image(data: bytes, width: int, height: int, shard: str, key: str,
                 check_orientation: bool = False) -> Image.Image:
    """Decode ``data`` completely to RGB, as stored (no EXIF rotation), and compare its size with the record's.

    Of 16 bits the upper 8 are kept, of grey as of colours.

    Args:
        check_orientation: refuse a picture that viewers show turned or mirrored, as building shards does.

    Raises:
        SampleError: "broken image", "rotated picture" or "size mismatch".
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            if check_orientation:
                _check_orientation(opened, shard, key)
            image = _to_rgb(opened)
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(shard, key, "broken image", f"{len(data)} bytes are no PNG, JPEG or WebP image") from error
    except Exception as error:  # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, ...)
        raise SampleError(shard, key, "broken image",
                          f"{len(data)} bytes do not decode ({type(error).__name__}: {error})") from error
    if image.size != (width, height):
        raise SampleError(shard, key, "size mismatch",
                          f"the record says {width} x {height}, the stored image is {image.width} x {image.height}")
    return image


def _to_rgb(opened: Image.Image) -> Image.Image:
    if opened.mode.startswith("I"):  # 16 bits of grey: convert("RGB") alone would cut all above 255 to white
        opened = opened.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif opened.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixels of mode {opened.mode!r} have no exact meaning in 8 bits; save it as 8-bit RGB")
    return opened.convert("RGB")


def _check_orientation(opened: Image.Image, shard: str, key: str) -> None:
    try:
        orientation = opened.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF, of many types: a viewer cannot turn by it either
        return
    if orientation in _ROTATED:
        raise SampleError(shard, key, "rotated picture",
                          f"its EXIF orientation is {orientation}: viewers show the stored {opened.width} x "
                          f"{opened.height} pixels turned or mirrored, so what its boxes refer to is not known; "
                          "save the picture again the way its boxes were drawn, without the orientation tag")


def read_size(data: bytes, shard: str, key: str) -> tuple[int, int]:
    """Width and height of an encoded picture, without decoding its pixels; raises ``SampleError`` "broken image"."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            return opened.size
    except Exception as error:  # as in decode_image
        raise SampleError(shard, key, "broken image", f"{len(data)} bytes are no PNG, JPEG or WebP image "
                          f"({type(error).__name__})") from error


def with_image(sample: Sample, record: RawRecord) -> Sample:
    """Return ``sample`` (from ``parse_record(record)``) with its image decoded; raises as ``decode_image``."""
    data = _content(record, _image_suffix(record))
    image = decode_image(data, sample.width, sample.height, record.shard, record.key)
    return dataclasses.replace(sample, image=image)


def check_sample(sample: Sample) -> None:
    """Raise ``SampleError`` unless ``sample`` can be written to a shard and read back as it is."""
    if not _KEY.fullmatch(sample.key):
        raise SampleError(sample.shard, sample.key, "bad key",
                          "a key is 1 to 92 of the characters A-Z a-z 0-9 _ - / and does not start with '__'")
    clash = sorted(set(sample.meta) & set(RECORD_FIELDS))
    if clash:
        raise SampleError(sample.shard, sample.key, "bad json", f"meta may not use the record's own names {clash}")
    sample_from_fields(_fields(sample), sample.shard, sample.key)
    record_json(sample)
    if not isinstance(sample.image, Image.Image) or sample.image.mode != "RGB":
        raise SampleError(sample.shard, sample.key, "missing image", f"expected an RGB picture, got {sample.image!r}")
    if sample.image.size != (sample.width, sample.height):
        raise SampleError(sample.shard, sample.key, "size mismatch",
                          f"the sample says {sample.width} x {sample.height}, its image is {sample.image.size}")


def record_json(sample: Sample) -> bytes:
    """The JSON member of ``sample``: sorted keys, UTF-8, floats written so that they read back bit-equal."""
    try:
        return json.dumps(_fields(sample), sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(sample.shard, sample.key, "bad json",
                          f"the sample does not fit into JSON in UTF-8 ({error})") from error


def _fields(sample: Sample) -> dict[str, Any]:
    asked = {"task": sample.task} if sample.task != "rec" else {}
    labels = {"labels": list(sample.labels)} if sample.labels else {}
    return {**sample.meta, "id": sample.key, "width": sample.width, "height": sample.height,
            "expression": sample.expression, "boxes_xyxy_px": [list(box) for box in sample.boxes_xyxy_px], **asked,
            **labels}


def _image_suffix(record: RawRecord) -> str | None:
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in record.files), None)


def _content(record: RawRecord, suffix: str) -> bytes:
    member = record.files[suffix]
    try:
        return member if isinstance(member, bytes) else member.read()
    except OSError as error:
        raise SampleError(record.shard, record.key, "torn shard",
                          f"the .{suffix} member cannot be read any more ({error}); copy the shard again") from error


def _finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is no finite number (a bool is none)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
