"""Find boxes in an answer, with the labels and scores that stand beside them, in the units of the text.

One pass with regular expressions, linear in the length of the text; nothing recurses and nothing is evaluated, so
hostile answers cost no more than long ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Sequence

from megavg.ops.box_formats import TOKENS
from megavg.ops.boxes import is_degenerate
from megavg.ops.number_text import number_fault, split_numbers
from megavg.ops.text_parts import MAX_LABEL, answer_part
from megavg.protocols.sample import Box

MAX_BOXES = 1000
"""An answer with more boxes is rejected: matching costs predicted x true boxes."""
MAX_DEPTH = 64
"""Objects nested deeper give their boxes no label; it bounds what is kept while reading."""

BOX_KEYS = ("bbox_2d", "bbox")
LABEL_KEYS = ("label", "class", "class_name", "category", "name")
SCORE_KEYS = ("score", "confidence")

_NAMES = "|".join(sorted(LABEL_KEYS + SCORE_KEYS, key=len, reverse=True))
_STRING = rf'"(?:[^"\\\n]|\\.){{0,{MAX_LABEL}}}"|' + rf"'(?:[^'\\\n]|\\.){{0,{MAX_LABEL}}}'"
PAIR = rf"""["'](?P<key>{_NAMES})["']\s*:\s*(?:(?P<text>{_STRING})|(?P<number>[+-]?[0-9.][0-9.eE+-]{{0,64}}))"""
_LIST = re.compile(r"\[(?P<list>[^\[\]{}]*)\]")
_PAIR = re.compile(PAIR)
_JSON_PIECE = re.compile(rf"{_LIST.pattern}|(?P<open>\{{+)|(?P<close>\}}+)|{PAIR}")
_KEY_BEFORE = re.compile(r"""(\w+)["']?\s*:$""")
_TOKEN_PIECE = re.compile(
    r"(?P<start><\|box_start\|>\s*)?\((?P<low>[^(),]*,[^(),]*)\)\s*,\s*\((?P<high>[^(),]*,[^(),]*)\)"
    rf"|<\|object_ref_start\|>(?P<ref>(?:(?!<\|).){{0,{MAX_LABEL}}})<\|object_ref_end\|>", re.DOTALL)


@dataclass
class Beside:
    """What an object of the answer says about its boxes; filled in while it is read."""

    label: str | None = None
    score: float | None = None


@dataclass
class Candidate:
    """Something that may be a box or a point.

    Attributes:
        numbers: the text of its numbers, with commas between them.
        key: the key or token that stands before it; "" where none does.
        beside: the label and score of its object.
    """

    numbers: str
    key: str = ""
    beside: Beside = field(default_factory=Beside)


def read_boxes(text: str, box_format: str) -> tuple[list[tuple[Box, Beside]], str]:
    """Boxes in the units of the text with what stands beside them and "ok", or no boxes and the reason."""
    answer = answer_part(text)
    if answer is None:
        return [], "no answer"
    if not answer.strip():
        return [], "empty answer"
    if box_format == TOKENS:
        candidates = _token_candidates(answer)
    elif "[" in answer or "{" in answer:
        candidates = json_candidates(answer, BOX_KEYS)
    else:
        return [], "no JSON"
    if candidates is None:
        return [], "too many boxes"
    marked = [each for each in candidates if each.key]
    bare = [each for each in candidates if not each.key]
    if not marked and any(looks_like_box(each.numbers) for each in bare):
        # Without a key, a list that is no box may be anything ("see [1]"): it does not spoil those that are.
        bare = [each for each in bare if looks_like_box(each.numbers)]
    return _to_boxes(marked or bare)


def json_candidates(text: str, keys: Sequence[str]) -> list[Candidate] | None:
    """Every innermost list that stands under one of ``keys`` or under no key; None when there are too many."""
    candidates: list[Candidate] = []
    counts = {True: 0, False: 0}
    objects, untracked = [Beside()], 0  # the first one stands for the text outside of all objects
    # Where nothing has a label or score, nobody needs to know where objects begin and end.
    for found in (_JSON_PIECE if _PAIR.search(text) else _LIST).finditer(text):
        kind, piece = found.lastgroup, found.group()
        if kind == "list":
            key = _key_before(text, found.start(), keys)
            if key is None:
                continue
            candidates.append(Candidate(found["list"], key, Beside() if untracked else objects[-1]))
            counts[bool(key)] += 1
            if counts[bool(key)] > MAX_BOXES:
                return None
        elif kind == "open":
            new = min(len(piece), MAX_DEPTH - len(objects))
            objects += [Beside() for _ in range(new)]
            untracked += len(piece) - new
        elif kind == "close":
            ended = max(len(piece) - untracked, 0)
            untracked = max(untracked - len(piece), 0)
            del objects[max(len(objects) - ended, 1):]
        elif len(objects) > 1 and not untracked:
            _take_pair(objects[-1], found)
    return candidates


def looks_like_box(numbers: str) -> bool:
    """True for four numbers, whatever their size."""
    return numbers.count(",") == 3 and all(number_fault(part) != "not a number" for part in split_numbers(numbers))


def to_box(numbers: str) -> tuple[Box | None, str]:
    """The box of four numbers and "ok", or None and the reason."""
    if numbers.count(",") != 3:
        return None, "not four numbers"
    parts = split_numbers(numbers)
    fault = next(filter(None, map(number_fault, parts)), None)
    if fault:
        return None, "not four numbers" if fault == "not a number" else fault
    box = tuple(map(float, parts))
    return (None, "degenerate box") if is_degenerate(box) else (box, "ok")


def read_string(literal: str) -> str:
    """The text of a string literal in double or single quotes, its escapes read as JSON's."""
    inner = literal[1:-1]
    if literal[0] == "'":
        return inner.replace("\\'", "'")
    try:
        return json.loads(literal, strict=False)
    except ValueError:
        return inner


def _take_pair(beside: Beside, found: re.Match) -> None:
    if found["key"] in LABEL_KEYS:
        if found["text"]:
            beside.label = read_string(found["text"])
    elif found["number"] and number_fault(found["number"]) is None:
        beside.score = float(found["number"])


def _key_before(text: str, start: int, keys: Sequence[str]) -> str | None:
    """The one of ``keys`` that names the list at ``start``; "" where no key does, None for another key in quotes."""
    # A window of fixed size keeps the look back at the key linear over the whole text.
    before = text[max(0, start - 48):start].rstrip()
    key = _KEY_BEFORE.search(before) if before.endswith(":") else None
    if key is None:
        return ""
    if key.group(1) in keys:
        return key.group(1)
    return None if before[key.start() - 1:key.start()] in ('"', "'") else ""


def _token_candidates(text: str) -> list[Candidate] | None:
    """Every pair of corners; a box token without corners is malformed. None when there are too many."""
    candidates: list[Candidate] = []
    unfilled = text.count("<|box_start|>")
    beside = Beside()
    for found in _TOKEN_PIECE.finditer(text):
        if found["ref"] is not None:
            beside = Beside(found["ref"])
            continue
        is_marked = found["start"] is not None
        unfilled -= is_marked
        candidates.append(Candidate(f"{found['low']},{found['high']}", "box_start" if is_marked else "", beside))
        if len(candidates) > 2 * MAX_BOXES:
            return None
    if unfilled:
        candidates.append(Candidate("", "box_start"))
    return candidates if len(candidates) <= MAX_BOXES else None


def _to_boxes(candidates: Sequence[Candidate]) -> tuple[list[tuple[Box, Beside]], str]:
    boxes: list[tuple[Box, Beside]] = []
    for candidate in candidates:
        box, reason = to_box(candidate.numbers)
        if box is None:
            return [], reason
        boxes.append((box, candidate.beside))
    return boxes, "ok" if boxes else "no box"
