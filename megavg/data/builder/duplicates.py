"""Find samples that are the same although their keys differ: equal bytes of the picture, equal question and answer."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Iterable

from megavg.data.readers.base import Draft, ImageSource

_SOURCES_PER_JOB = 64


def candidates(drafts: Iterable[Draft]) -> list[list[Draft]]:
    """Groups of two or more drafts whose expression, boxes, task and labels agree: only these need a look.

    Drawn samples, which have no file behind them, and rows that could not be read are never taken for duplicates.
    """
    groups: dict[bytes, list[Draft]] = {}
    for draft in drafts:
        if draft.image is not None and draft.problem is None:
            groups.setdefault(_question(draft), []).append(draft)
    return [group for group in groups.values() if len(group) > 1]


def sources_to_hash(groups: list[list[Draft]]) -> list[list[ImageSource]]:
    """The pictures whose bytes must be read to tell the drafts of ``groups`` apart, in portions for many processes.

    A group whose drafts all name one picture needs none: RefCOCO's repeated sentences cost no reading.
    """
    needed: dict[ImageSource, None] = {}
    for group in groups:
        distinct = dict.fromkeys(draft.image for draft in group)
        if len(distinct) > 1:
            needed.update(distinct)
    found = list(needed)
    return [found[start:start + _SOURCES_PER_JOB] for start in range(0, len(found), _SOURCES_PER_JOB)]


def hash_sources(sources: list[ImageSource], tick=None) -> list[tuple[ImageSource, str]]:
    """Checksums of the bytes of pictures; one that cannot be read is missing (its shard will say so)."""
    hashes = []
    for source in sources:
        try:
            hashes.append((source, hashlib.sha256(source.read()).hexdigest()))
        except (OSError, ValueError):
            continue
    return hashes


def pairs(groups: list[list[Draft]], hashes: dict[ImageSource, str]) -> list[tuple[Draft, Draft]]:
    """(first, later) for every draft that is the same as an earlier one, by group, each group in its order."""
    found = []
    for group in groups:
        first: dict[Any, Draft] = {}
        for draft in group:
            earlier = first.setdefault(hashes.get(draft.image, draft.image), draft)
            if earlier is not draft:
                found.append((earlier, draft))
    return found


def _question(draft: Draft) -> bytes:
    fields = draft.fields
    facts = [fields.get("expression"), fields.get("task", "rec"), fields.get("labels") or (),
             draft.box_frame, _numbers(fields.get("boxes_xyxy_px"))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


def _numbers(boxes: Any) -> Any:
    """Boxes as floats, so that 3 and 3.0 are the same; anything that is no list of boxes as it is."""
    try:
        return [[float(value) for value in box] for box in boxes]
    except (TypeError, ValueError, OverflowError):
        return boxes
