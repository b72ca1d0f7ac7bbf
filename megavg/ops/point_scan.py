"""Find points in an answer, in the units of the text; a box counts by its centre. Linear, nothing is evaluated."""

from __future__ import annotations

import re
from megavg.ops.box_formats import TOKENS
from megavg.ops.box_scan import BOX_KEYS, MAX_BOXES, Candidate, json_candidates, to_box
from megavg.ops.boxes import center
from megavg.ops.number_text import MAX_DIGITS, number_fault, split_numbers
from megavg.ops.text_parts import answer_part, pair_breaks_off
from megavg.protocols.sample import Box

POINT_KEYS = ("point_2d", "point", "points", "coordinate", "coordinates")

Point = tuple[float, float]

_IN_PARENTHESES = rf"\(([^()]{{1,{2 * MAX_DIGITS + 40}}})\)"
_PIECE = re.compile(rf"(?P<start><\|box_start\|>\s*)?{_IN_PARENTHESES}(?:\s*,\s*{_IN_PARENTHESES})?"
                    r"(?P<end>\s*<\|box_end\|>)?")
_NAME = re.compile(r"[xy]\s*=\s*")


def read_points(text: str, box_format: str) -> tuple[list[tuple[Point, Box | None]], str]:
    """Points in the units of the text, each with the box it is the centre of, and "ok"; or none and the reason."""
    answer = answer_part(text)
    if answer is None:
        return [], "no answer"
    if not answer.strip():
        return [], "empty answer"
    candidates = _in_parentheses(answer) if box_format == TOKENS else _json_candidates(answer)
    if candidates is None:
        return [], "too many points"
    keyed = [each for each in candidates if each.key]
    bare = [each for each in candidates if not each.key]
    if not keyed and any(_looks_like_point(each.numbers) for each in bare):
        # Without a key, brackets may hold anything ("see [1]"): they do not spoil the points.
        bare = [each for each in bare if _looks_like_point(each.numbers)]
    found = []
    for candidate in keyed or bare:
        point, box, reason = _to_point(candidate)
        if point is None:
            return [], reason
        found.append((candidate.key in BOX_KEYS, (point, box)))
    # Boxes beside points only say how large the things are.
    points = [each for is_box, each in found if not is_box] or [each for _, each in found]
    return points, "ok" if points else "no point"


def _json_candidates(text: str) -> list[Candidate] | None:
    """Lists under point and box keys, bare lists; where there is none of them, what stands in parentheses."""
    candidates = json_candidates(text, POINT_KEYS + BOX_KEYS)
    if candidates is None or any(each.key or _looks_like_point(each.numbers) for each in candidates):
        return candidates
    found = _in_parentheses(text)
    return None if found is None else found or candidates


def _in_parentheses(text: str) -> list[Candidate] | None:
    """``(x,y)`` or the box ``(x0,y0),(x1,y1)``, after a box token or, where there is none, anywhere."""
    candidates: list[Candidate] = []
    unfilled = text.count("<|box_start|>")
    for found in _PIECE.finditer(text):
        start, first, second, end = found.groups()
        first, second = _without_names(first), second and _without_names(second)
        if start is not None and end is None:
            continue  # a point with its box token may be the half of a box
        unfilled -= start is not None
        whole = first if second is None else f"{first},{second}"
        if start is not None or second is None or _looks_like_point(whole):
            candidates.append(Candidate(whole, "box_start" if start else ""))
        else:
            candidates += [Candidate(first), Candidate(second)]
        if len(candidates) > 2 * MAX_BOXES:
            return None
    if unfilled or (candidates and pair_breaks_off(text)):
        candidates.append(Candidate("", "box_start"))
    return candidates if len(candidates) <= MAX_BOXES else None


def _without_names(numbers: str) -> str:
    """The numbers of ``click(x=1, y=2)``."""
    return ",".join(_NAME.sub("", part, count=1) if part[:1] in ("x", "y") else part for part in split_numbers(numbers))


def _looks_like_point(numbers: str) -> bool:
    return numbers.count(",") in (1, 3) and all(number_fault(part) != "not a number" for part in split_numbers(numbers))


def _to_point(candidate: Candidate) -> tuple[Point | None, Box | None, str]:
    """The point, the box that it is the centre of, and "ok"; or None, None and the reason."""
    parts = split_numbers(candidate.numbers)
    if len(parts) == 4:
        box, reason = to_box(candidate.numbers)
        if box is None:
            return None, None, "not two numbers" if reason == "not four numbers" else reason
        return center(box), box, "ok"
    if len(parts) != 2 or candidate.key in BOX_KEYS:
        return None, None, "not two numbers"
    fault = next(filter(None, map(number_fault, parts)), None)
    if fault:
        return None, None, "not two numbers" if fault == "not a number" else fault
    return (float(parts[0]), float(parts[1])), None, "ok"
