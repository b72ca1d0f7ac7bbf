"""Find the boxes that the answer of a written conversation states, without evaluating its text."""

from __future__ import annotations

import json
import re
from typing import Any

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_QUADRUPLE = re.compile(rf"[\[(]({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})[\])]")
_CORNERS = re.compile(rf"\(({_NUMBER}),({_NUMBER})\)\s*,\s*\(({_NUMBER}),({_NUMBER})\)")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCE = re.compile(r"```(?:\w+)?\s*(.*?)```", re.DOTALL)
_NOTHING = ("none", "no objects", "[]")

Found = list[tuple[list[float], str | None]]


def boxes_of(answer: Any) -> Found | None:
    """The boxes of an answer in its own numbers, each with its label or None; [] for "None", None without any.

    A value that has the shape of JSON is read as JSON: four numbers, a list of such lists, objects with "bbox_2d" or
    "bbox" and "label". In other text every [x0, y0, x1, y1] and (x0,y0),(x1,y1) counts.
    """
    if not isinstance(answer, str):
        return _from_value(answer)
    inside = _ANSWER.findall(answer)
    text = (inside[-1] if inside else answer).strip()
    fenced = _FENCE.search(text)
    text = fenced.group(1).strip() if fenced else text
    if text.strip(" .").lower() in _NOTHING:
        return []
    try:
        return _from_value(json.loads(text))
    except (ValueError, RecursionError):
        pass
    matches = list(_CORNERS.finditer(text)) or list(_QUADRUPLE.finditer(text))
    return [([float(number) for number in match.groups()], None) for match in matches] or None


def _from_value(value: Any) -> Found | None:
    if isinstance(value, dict):
        box = value.get("bbox_2d", value.get("bbox"))
        label = value.get("label")
        boxes = _from_value(box)
        if boxes is None or (label is not None and not isinstance(label, str)):
            return None
        return [(numbers, label) for numbers, _ in boxes]
    if not isinstance(value, list):
        return None
    if len(value) == 4 and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
        return [(value, None)]
    # One level of nesting is a list of boxes; more, or anything else in it, is no answer.
    parts = [_from_value(part) if isinstance(part, dict) or _is_flat(part) else None for part in value]
    if any(part is None for part in parts):
        return None
    return [box for part in parts for box in part]


def _is_flat(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 4 and not any(isinstance(entry, (list, dict)) for entry in part)


def classes_of(text: str) -> str:
    """The classes that a question lists ('["cat", "dog"]', "{cat, dog}", or lines with dashes) as "cat, dog"."""
    text = text.strip()
    for candidate in (text, text.replace("'", '"')):
        try:
            names = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return ", ".join(name.strip() for name in names)
    lines = [line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")]
    return ", ".join(lines) if lines else text.strip("[]{}").strip()
