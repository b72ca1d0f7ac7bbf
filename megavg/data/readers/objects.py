"""From a picture and its labelled objects to samples: one way for every format that lists objects per picture.

task            samples
=============== ====================================================================================================
detection       one per picture: every object that is not left out, in the order of the file; the expression names
                the classes asked for, "king, queen"; what else is known of the objects is meta["objects"]
rec, point      one per picture and class that occurs exactly once in it: "the queen"
classification  one per picture whose objects are all of one class: that class among the classes asked for
=============== ====================================================================================================
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterator, Sequence

from megavg.data.readers.base import Draft, ImageSource, key_from
from megavg.protocols.sample import TASKS


@dataclass(frozen=True)
class Thing:
    """One object: its ``box`` (x0, y0, x1, y1) in pixels, unchecked, its class, and what else goes to the record.

    ``is_left_out`` objects (crowds, difficult ones) are no answer, but they count where a class must occur once.
    """

    box: Any
    label: str
    is_left_out: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One picture and its objects; ``key_parts`` make it unique, ``fields`` hold its size and what else is known."""

    where: str
    key_parts: tuple[Any, ...]
    image: ImageSource
    things: list[Thing]
    fields: dict[str, Any]


def check_task(task: str) -> None:
    """Raise ``ValueError`` unless ``task`` is one of ``TASKS``."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} is none of {', '.join(TASKS)}")


def chosen_classes(classes: Sequence[str] | None, known: Sequence[str], source: str) -> tuple[str, ...]:
    """The classes asked for, in the order given; all that ``source`` knows where none are named.

    Raises:
        ValueError: a class that ``source`` does not know, or it knows none.
    """
    if not known:
        raise ValueError(f"{source}: holds no classes")
    unknown = [name for name in classes or () if name not in known]
    if unknown:
        shown = ", ".join(known[:100]) + (", ..." if len(known) > 100 else "")
        raise ValueError(f"{source}: has no class {', '.join(map(repr, unknown))}; it has {shown}")
    return tuple(dict.fromkeys(classes or known))


def picture_drafts(picture: Picture, task: str, classes: Sequence[str], keep_empty: bool = False,
                   clip_px: float = 0.0) -> Iterator[Draft]:
    """Yield the samples of ``picture`` for ``task``; see the table above.

    Args:
        classes: those asked for, in the order of the question.
        keep_empty: also yield a detection without any box; its right answer is "None".
        clip_px: see ``Draft``.
    """
    things = [(place, thing) for place, thing in enumerate(picture.things) if thing.label in classes]
    kept = [(place, thing) for place, thing in things if not thing.is_left_out]
    counts = Counter(thing.label for _, thing in things)
    question = ", ".join(classes)
    if task == "detection":
        # A picture with nothing but a crowd of persons is no example of a picture without persons.
        if kept or (keep_empty and not things):
            boxes = [thing for _, thing in kept]
            objects = {"objects": [thing.meta for thing in boxes]} if any(thing.meta for thing in boxes) else {}
            yield _draft(picture, picture.key_parts, clip_px, {
                "expression": question, "task": task, **objects, "boxes_xyxy_px": [thing.box for thing in boxes],
                "labels": [thing.label for thing in boxes]})
    elif task == "classification":
        if len(counts) == 1 and kept:
            yield _draft(picture, picture.key_parts, clip_px, {
                "expression": question, "task": task, "boxes_xyxy_px": [], "labels": list(counts)})
    else:
        asked = {"task": task} if task != "rec" else {}
        for place, thing in kept:
            if counts[thing.label] == 1:
                yield _draft(picture, (*picture.key_parts, place), clip_px, {
                    **thing.meta, **asked, "label": thing.label, "expression": f"the {thing.label}",
                    "boxes_xyxy_px": [thing.box]})


def _draft(picture: Picture, key_parts: tuple[Any, ...], clip_px: float, fields: dict[str, Any]) -> Draft:
    return Draft(picture.where, key_from(*key_parts), picture.image, {**picture.fields, **fields}, clip_px=clip_px)
