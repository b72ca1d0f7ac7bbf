"""Read Hugging Face data sets that lie on disk as parquet files: one sample per row, or per text of a row.

The picture stands in a column of {"bytes", "path"} (the way of ``datasets.Image``) or of paths. Which columns hold
what differs from set to set, and so do the order of a box's numbers and its frame: they have to be named. A column
inside another is written with a dot, "objects.bbox". Needs pyarrow.
"""

from __future__ import annotations

import functools
import glob
import os
from dataclasses import dataclass, replace
from typing import Any, Iterator

from megavg.data.readers.base import Draft, PictureFolder, broken, key_from, key_word
from megavg.data.readers.coco import CLIP_PX
from megavg.data.readers.files import check_choice, existing_folder
from megavg.data.readers.frames import LAYOUTS, check_frame, from_xywh
from megavg.data.sample import RECORD_FIELDS


@dataclass(frozen=True)
class ParquetImage:
    """The picture in one row of a parquet file; only its column of its row group is read, when asked."""

    path: str
    row_group: int
    row: int
    column: str
    folder: PictureFolder

    def read(self) -> bytes:
        """The bytes in the row, or of the file that it names."""
        try:
            value = _image_column(self.path, self.row_group, self.column)[self.row].as_py()
        except Exception as error:  # pyarrow raises many types, on broken pages too
            raise OSError(f"row {self.row} of row group {self.row_group} does not read ({error})") from error
        if isinstance(value, list):
            if len(value) != 1:
                raise OSError(f"the column {self.column!r} holds {len(value)} pictures, expected one")
            value = value[0]
        value = value if isinstance(value, dict) else {"path": value}
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise OSError(f"the column {self.column!r} holds neither bytes nor a path")
        return self.folder.file(path).read()

    def __str__(self) -> str:
        return f"{self.path} row group {self.row_group} row {self.row}"


@functools.lru_cache(maxsize=1)
def _image_column(path: str, row_group: int, column: str) -> Any:
    """The pictures of one row group; rows are asked for in order, so one is enough, and memory stays bounded."""
    with _pyarrow().ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(column)


@dataclass(frozen=True)
class _Columns:
    image: str
    expression: str | None
    bbox: str
    label: str | None
    meta: dict[str, str]  # name in the record -> column

    @property
    def light(self) -> list[str]:
        """All but the picture."""
        return [name for name in (self.expression, self.bbox, self.label, *self.meta.values()) if name]


def read(annotations: str, frame: str, bbox_format: str, expression_column: str | None = None,
         bbox_column: str = "bbox", image_column: str = "image", label_column: str | None = None,
         class_names: list[str] | None = None, meta_columns: list[str] | None = None, split: str | None = None,
         task: str = "rec", image_root: str | None = None, clip: float = CLIP_PX,
         allow_outside: bool = False) -> Iterator[Draft]:
    """Yield the samples of parquet files, row group by row group; pictures are read later.

    Args:
        annotations: a file, a folder (with everything below it) or a glob of .parquet files.
        frame: what the boxes are counted in: pixels, relative_1, relative_1000 or relative_1_square.
        bbox_format: "xyxy" (corners) or "xywh" (corner, width, height).
        expression_column: what to find. A list of texts gives one sample each: with as many boxes as texts each
            text has its own box, with one box all have that one. With task=detection it may be left out: the
            classes are then those of class_names.
        bbox_column: four numbers, or a list of boxes.
        image_column: {"bytes", "path"}, or a path, or a list with one of these.
        label_column: with task=detection, the class of each box: a text, or a number of ``class_names``.
        class_names: names of the classes by number, from 0.
        meta_columns: columns that go to the record as they are, such as data_type; platform=data_source gives the
            column data_source the name platform.
        split: take only files named SPLIT-*.parquet or SPLIT.parquet, or in a folder SPLIT; None takes all.
        task: "rec", "point" or "detection".
        image_root: the folder that paths in the image column are relative to; None: that of the file.
        clip: boxes that leave the picture by at most so many pixels are cut at its edge.
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: pyarrow is missing, there are no such files, a column is missing, an unknown frame or task.
    """
    meta = {name: column or name for name, _, column in (each.partition("=") for each in meta_columns or ())}
    _check_options(frame, bbox_format, task, label_column, expression_column, class_names, meta)
    if image_root is not None:
        existing_folder(image_root, "image_root", "the pictures")
    columns = _Columns(image_column, expression_column, bbox_column, label_column, meta)
    paths = _paths(annotations, split)
    for path in paths:
        _check_columns(path, columns)
    known = {"source_frame": frame, **({"task": task} if task != "rec" else {}), **({"split": split} if split else {})}
    names = dict(enumerate(class_names or ()))
    for place, path in enumerate(paths):
        root = image_root if image_root is not None else os.path.dirname(path)
        for group, row, values in _rows(path, columns):
            image = ParquetImage(path, group, row, image_column, PictureFolder(root, allow_outside))
            for draft in _row_drafts(values, image, (key_word(path), place, group, row), columns, bbox_format, names):
                yield replace(draft, fields={**known, **draft.fields}, box_frame=frame, clip_px=clip)


def _check_options(frame: str, bbox_format: str, task: str, label_column: str | None, expression_column: str | None,
                   class_names: list[str] | None, meta: dict[str, str]) -> None:
    check_frame(frame)
    check_choice(bbox_format, LAYOUTS, "bbox_format")
    check_choice(task, ("rec", "point", "detection"), "task")
    if (task == "detection") != (label_column is not None):
        raise ValueError(f"task={task!r} with label_column={label_column!r}: a detection needs one, other tasks have "
                         "none")
    if expression_column is None and not (task == "detection" and class_names):
        raise ValueError("name expression_column, the column that says what to find")
    clash = sorted({*meta} & {*RECORD_FIELDS} - {"width", "height"})
    if clash:
        raise ValueError(f"meta_columns={clash}: these names are the record's own; leave them out, or give another, as "
                         f"in other={clash[0]}")


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet files needs pyarrow, which is not installed: pip install pyarrow") from error
    return pyarrow.parquet


def _paths(annotations: str, split: str | None) -> list[str]:
    if os.path.isdir(annotations):
        found = glob.glob(os.path.join(glob.escape(annotations), "**", "*.parquet"), recursive=True)
    else:
        found = glob.glob(annotations, recursive=True)
    found = sorted(path for path in found if path.endswith(".parquet") and os.path.isfile(path))
    if not found:
        arrow = glob.glob(os.path.join(glob.escape(annotations), "**", "*.arrow"), recursive=True)
        remedy = "; it holds .arrow files of save_to_disk: write parquet with Dataset.to_parquet" if arrow else ""
        raise ValueError(f"{annotations}: no .parquet file there{remedy}")
    chosen = [path for path in found if split is None or _is_of(path, split)]
    if not chosen:
        shown = ", ".join(os.path.basename(path) for path in found[:10])
        raise ValueError(f"{annotations}: no file of split {split!r} ({split}-*.parquet, {split}.parquet, or in a "
                         f"folder {split}), only {shown}")
    return chosen


def _is_of(path: str, split: str) -> bool:
    folder, name = os.path.split(path)
    return name == split + ".parquet" or name.startswith(split + "-") or os.path.basename(folder) == split


def _check_columns(path: str, columns: _Columns) -> None:
    try:
        schema = _pyarrow().read_schema(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path!r} as parquet: {error}") from error
    for column in (columns.image, *columns.light):
        top, *rest = column.split(".")
        kind = schema.field(top).type if top in schema.names else None
        for name in rest if kind is not None else ():
            kind = getattr(kind, "value_type", kind)
            kind = kind.field(name).type if getattr(kind, "num_fields", 0) and kind.get_field_index(name) >= 0 else None
            if kind is None:
                break
        if kind is None:
            raise ValueError(f"{path}: has no column {column!r}; it has {', '.join(schema.names)}")


def _rows(path: str, columns: _Columns) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(row group, row in it, values by column name) of every row, one row group in memory at a time."""
    tops = sorted({column.split(".")[0] for column in columns.light})
    with _pyarrow().ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row, found in enumerate(file.read_row_group(group, columns=tops).to_pylist()):
                yield group, row, {column: _inside(found, column.split(".")) for column in columns.light}


def _inside(value: Any, names: list[str]) -> Any:
    """The value at a dotted name; of a list of structures the list of their values."""
    for place, name in enumerate(names):
        if isinstance(value, list):
            return [_inside(part, names[place:]) for part in value]
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _row_drafts(values: dict[str, Any], image: ParquetImage, key_parts: tuple[Any, ...], columns: _Columns,
                bbox_format: str, class_names: dict[int, str]) -> Iterator[Draft]:
    boxes = values[columns.bbox]
    if isinstance(boxes, list) and not any(isinstance(box, list) for box in boxes) and boxes:
        boxes = [boxes]
    if bbox_format == "xywh" and isinstance(boxes, list):
        boxes = [from_xywh(box) for box in boxes]
    fields = {"boxes_xyxy_px": boxes, **{name: _plain(values[column]) for name, column in columns.meta.items()}}
    if columns.label:
        labels = values[columns.label]
        labels = labels if isinstance(labels, list) else [labels]
        unknown = [label for label in labels if isinstance(label, int) and label not in class_names]
        if unknown:
            yield broken(str(image), key_from(*key_parts), "bad labels", f"class number {unknown[0]} has no name; name "
                         "the classes with class_names")
            return
        fields["labels"] = [class_names[label] if isinstance(label, int) else label for label in labels]
    texts = values[columns.expression] if columns.expression else list(class_names.values())
    texts = texts if isinstance(texts, list) else [texts]
    if columns.label:
        texts = [", ".join(map(str, texts))]
    if not texts:
        yield broken(str(image), key_from(*key_parts), "missing field", f"no text in {columns.expression!r}")
    # Several texts and several boxes are lists side by side, as in {"bbox": [...], "caption": [...]}.
    are_pairs = min(len(texts), len(boxes) if isinstance(boxes, list) else 0) > 1
    if are_pairs and len(texts) != len(boxes):
        yield broken(str(image), key_from(*key_parts), "bad labels", f"{len(texts)} texts and {len(boxes)} boxes: "
                     "which box belongs to which text? Expected as many of each, or one of either")
        return
    for turn, text in enumerate(texts):
        own = {"boxes_xyxy_px": [boxes[turn]]} if are_pairs else {}
        yield Draft(str(image), key_from(*key_parts, turn), image, {**fields, **own, "expression": text})


def _plain(value: Any) -> Any:
    """A value that JSON can hold: dates, decimals and bytes become texts."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
