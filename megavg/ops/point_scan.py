"""Find points in an answer, in the units of the text; a box counts by its centre. Linear, nothing is evaluated."""

from __future__ import annotations

import re
from typing import Sequence

from megavg.ops.box_formats import TOKENS
from megavg.ops.box_scan import BOX_KEYS, MAX_BOXES, Candidate, json_candidates, to_box
from megavg.ops.boxes import center
from megavg.ops.number_text import MAX_DIGITS, number_fault, split_numbers
from megavg.ops.text_parts import answer_part
from megavg.protocols.sample import Box

POINT_KEYS = ("point_2d", "point", "points", "coordinate", "coordinates")

Point = tuple[float, float]

_IN_PARENTHESES = rf"\(([^()]{{1,{2 * MAX_DIGITS + 40}}})\)"
_PARENTHESES = re.compile(_IN_PARENTHESES)
_TOKEN_PIECE = re.compile(rf"(?P<start><\|box_start\|>\s*)?{_IN_PARENTHESES}(?:\s*,\s*{_IN_PARENTHESES})?")
_NAME = re.compile(r"[xy]\s*=\s*")


def read_points(text: str, box_format: str) -> tuple[list[tuple[Point, Box | None]], str]:
    """Points in the units of the text, each with the box it is the centre of, and "ok"; or none and the reason."""
    answer = answer_part(text)
    if answer is None:
        return [], "no answer"
    if not answer.strip():
        return [], "empty answer"
    candidates = _token_candidates(answer) if box_format == TOKENS else _json_candidates(answer)
    if candidates is None:
        return [], "too many points"
    bare = [each for each in candidates if not each.key]
    marked = [each for each in candidates if each.key and each.key not in BOX_KEYS]
    marked = marked or [each for each in candidates if each.key]
    if not marked and any(_looks_like_point(each.numbers) for each in bare):
        # Without a key, brackets may hold anything ("see [1]"): they do not spoil the points.
        bare = [each for each in bare if _looks_like_point(each.numbers)]
    points = []
    for candidate in marked or bare:
        point, box, reason = _to_point(candidate.numbers)
        if point is None:
            return [], reason
        points.append((point, box))
    return points, "ok" if points else "no point"


def _json_candidates(text: str) -> list[Candidate] | None:
    """Lists under point and box keys, bare lists; where there is none of them, what stands in parentheses."""
    candidates = json_candidates(text, POINT_KEYS + BOX_KEYS) if "[" in text else []
    if candidates is None or any(each.key or _looks_like_point(each.numbers) for each in candidates):
        return candidates
    found = [Candidate(numbers) for numbers in _some(_PARENTHESES.finditer(text))]
    return None if len(found) > MAX_BOXES else found or candidates


def _some(matches) -> list[str]:
    """The first group of at most one match more than may be."""
    return [found.group(1) for found, _ in zip(matches, range(MAX_BOXES + 1))]


def _token_candidates(text: str) -> list[Candidate] | None:
    """``(x,y)`` or ``(x0,y0),(x1,y1)``, after a box token or, where there is none, anywhere."""
    candidates: list[Candidate] = []
    unfilled = text.count("<|box_start|>")
    for found in _TOKEN_PIECE.finditer(text):
        start, first, second = found.groups()
        unfilled -= start is not None
        candidates.append(Candidate(first if second is None else f"{first},{second}", "box_start" if start else ""))
        if len(candidates) > 2 * MAX_BOXES:
            return None
    if unfilled:
        candidates.append(Candidate("", "box_start"))
    return candidates if len(candidates) <= MAX_BOXES else None


def _parts(numbers: str) -> Sequence[str]:
    """The numbers, without the names of ``click(x=1, y=2)``."""
    return [_NAME.sub("", part, count=1) if part[:1] in "xy" else part for part in split_numbers(numbers)]


def _looks_like_point(numbers: str) -> bool:
    return numbers.count(",") in (1, 3) and all(number_fault(part) != "not a number" for part in _parts(numbers))


def _to_point(numbers: str) -> tuple[Point | None, Box | None, str]:
    """The point, the box that it is the centre of, and "ok"; or None, None and the reason."""
    if numbers.count(",") == 3:
        box, reason = to_box(numbers)
        if box is None:
            return None, None, "not two numbers" if reason == "not four numbers" else reason
        return center(box), box, "ok"
    if numbers.count(",") != 1:
        return None, None, "not two numbers"
    parts = _parts(numbers)
    fault = next(filter(None, map(number_fault, parts)), None)
    if fault:
        return None, None, "not two numbers" if fault == "not a number" else fault
    return (float(parts[0]), float(parts[1])), None, "ok"
