"""Find the boxes that the answer of a written conversation states, without evaluating its text."""

from __future__ import annotations

import json
import re
from typing import Any

_NUMBER = r"\s*-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\s*"  # as JSON writes numbers
_QUADRUPLE = re.compile(rf"({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})")
_CORNERS = re.compile(rf"\(({_NUMBER}),({_NUMBER})\)\s*,\s*\(({_NUMBER}),({_NUMBER})\)")
_GROUP = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_NUMERIC = re.compile(r"(?=[^,]*,)(?=[^0-9]*[0-9])[\s0-9.,;:eE+\-]*")
_LANGUAGE = re.compile(r"\w+[ \t]*\n|\w+\s*(?=[\[{(])")
_NOTHING = ("none", "no objects", "[]")

Found = list[tuple[list[float], str | None]]


def boxes_of(answer: Any) -> Found | None:
    """The boxes of an answer in its own numbers, each with its label or None; [] for "None", None without any.

    A value that has the shape of JSON is read as JSON: four numbers, a list of such lists, objects with "bbox_2d" or
    "bbox" and "label". In other text every [x0, y0, x1, y1] and (x0,y0),(x1,y1) counts; other numbers in brackets make
    the answer unreadable, so that no box of several is lost in silence. What stands before </think> does not count.
    """
    if not isinstance(answer, str):
        return _from_value(answer)
    text = _told(answer)
    if text.strip(" .").lower() in _NOTHING:
        return []
    try:
        return _from_value(json.loads(text))
    except (ValueError, RecursionError):
        pass
    return _scanned(text)


def _told(answer: str) -> str:
    """What is said behind </think>, inside the last <answer> and inside the first code fence, as far as there are."""
    text = answer[answer.rfind("</think>") + len("</think>"):] if "</think>" in answer else answer
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    text = text[start + len("<answer>"):end] if start >= 0 else text
    opened = text.find("```")
    closed = text.find("```", opened + 3)
    if 0 <= opened < closed:
        text = text[opened + 3:closed]
        language = _LANGUAGE.match(text)
        text = text[language.end():] if language else text
    return text.strip()


def _scanned(text: str) -> Found | None:
    """The boxes of running text in their order; None without any, or where a group of numbers is none."""
    boxes = [(match.start(), match.groups()) for match in _CORNERS.finditer(text)]
    # Taken out at equal length, so that the places of the others stay.
    rest = _CORNERS.sub(lambda match: " " * len(match.group()), text)
    for group in _GROUP.finditer(rest):
        numbers = _QUADRUPLE.fullmatch(group.group(1))
        if numbers:
            boxes.append((group.start(), numbers.groups()))
        elif _NUMERIC.fullmatch(group.group(1)):
            return None
    return [([float(number) for number in numbers], None) for _, numbers in sorted(boxes)] or None


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
