"""Find boxes in an answer, with the labels and scores that stand beside them, in the units of the text.

One pass with regular expressions, linear in the length of the text; nothing recurses and nothing is evaluated, so
hostile answers cost no more than long ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Sequence

from megavg.ops.box_formats import TOKENS
from megavg.ops.boxes import is_degenerate
from megavg.ops.number_text import number_fault, split_numbers
from megavg.ops.text_parts import MAX_LABEL, STRING, answer_part, breaks_off, pair_breaks_off
from megavg.protocols.sample import Box

MAX_BOXES = 1000
"""An answer with more boxes is rejected: matching costs predicted x true boxes."""
MAX_DEPTH = 64
"""Objects nested deeper give their boxes no label; it bounds what is kept while reading."""

BOX_KEYS = ("bbox_2d", "bbox")
LABEL_KEYS = ("label", "class", "class_name", "category", "name")
SCORE_KEYS = ("score", "confidence")

_NAMES = "|".join(sorted(LABEL_KEYS + SCORE_KEYS, key=len, reverse=True))
_SHORT = rf'"(?:[^"\\\n]|\\.){{0,{MAX_LABEL}}}"|' + rf"'(?:[^'\\\n]|\\.){{0,{MAX_LABEL}}}'"
_NUMBER = r"[+-]?[0-9.][0-9.eE+-]{0,64}"
_PAIR = rf"""["'](?P<name>{_NAMES})["']\s*:\s*(?:(?P<text>{_SHORT})(?!\s*+:)|(?P<number>{_NUMBER}))"""
_FLAT = r"\[[^\[\]{}:]*+\]"  # a key inside belongs to no list
_VALUE = rf"{_FLAT}|\[\s*+{_FLAT}(?:\s*+,\s*+{_FLAT})*+\s*+\]"
# What stands under another key is no box, be it a list, lists or a text.
_OTHER = rf"""(?P<other>["']\w{{0,64}}+["']\s*+:\s*+(?:{_VALUE}|{STRING}(?!\s*+:)))"""
_LIST = rf"(?P<list>{_FLAT})"
_LABELLED = re.compile(_PAIR)
_INNERMOST = re.compile(_FLAT)
_OBJECTS = re.compile(r"\[\s*+\{")
_LIST_KEYS = ("points", "coordinates")  # they may also name a list of objects, each with its own key
_TOKEN_PIECE = re.compile(
    r"(?P<start><\|box_start\|>\s*)?\((?P<low>[^(),]*,[^(),]*)\)\s*,\s*\((?P<high>[^(),]*,[^(),]*)\)"
    r"(?P<end>\s*<\|box_end\|>)?"
    rf"|<\|object_ref_start\|>(?P<ref>(?:(?!<\|).){{0,{MAX_LABEL}}})<\|object_ref_end\|>", re.DOTALL)


@dataclass
class Beside:
    """What an object of the answer says about its boxes; filled in while it is read.

    Attributes:
        rank: place of the label's key in ``LABEL_KEYS``: a ``name`` beside a ``label`` is not what it is.
    """

    label: str | None = None
    score: float | None = None
    rank: int = len(LABEL_KEYS)


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
    """Every list that stands under one of ``keys`` or under no key; None when there are too many.

    Under a key stands one list without lists inside, or a list of such. A key in quotes with anything else after its
    colon is a candidate without numbers, and so is an answer that breaks off: no parser takes it.
    """
    candidates: list[Candidate] = []
    counts = {True: 0, False: 0}
    objects = _Objects()
    # Where nothing has a label or score, nobody needs to know where objects begin and end.
    for found in _pieces(tuple(keys), bool(_LABELLED.search(text))).finditer(text):
        if found.lastgroup in ("open", "close", "text", "number"):
            objects.read(found)
            continue
        if found.lastgroup == "other":
            continue
        lists = [found["list"]] if found["list"] else []
        key = found["key"] or ""
        if key:
            lists = _INNERMOST.findall(found["value"] or "")
            if not lists and not _is_no_value(text, found):
                return [*candidates, Candidate("", key)]
        candidates += [Candidate(each[1:-1], key, objects.innermost()) for each in lists]
        counts[bool(key)] += len(lists)
        if counts[bool(key)] > MAX_BOXES:
            return None
    if candidates and breaks_off(text):
        candidates.append(Candidate("", keys[0]))
    return candidates


@lru_cache(maxsize=None)
def _pieces(keys: tuple[str, ...], labelled: bool) -> re.Pattern:
    names = "|".join(sorted(keys, key=len, reverse=True))
    keyed = rf"""["']?\b(?P<key>{names})(?P<quote>["']?)\s*+:\s*+(?P<value>{_VALUE})?"""
    if not labelled:
        return re.compile(f"{keyed}|{_OTHER}|{_LIST}")
    return re.compile(rf"{keyed}|{_PAIR}|{_OTHER}|{_LIST}|(?P<open>\{{+)|(?P<close>\}}+)")


def _is_no_value(text: str, found: re.Match) -> bool:
    """True where the name of a key is a word of the prose, or names a list of objects with keys of their own."""
    if found["key"] in _LIST_KEYS and _OBJECTS.match(text, found.end()):
        return True
    return not found["quote"] and not text.startswith("[", found.end())


class _Objects:
    """The objects that are open at a place of the text, and what each says about its boxes."""

    def __init__(self):
        self.open = [Beside()]  # the first one stands for the text outside of all objects
        self.untracked = 0

    def innermost(self) -> Beside:
        """What is said beside a list at this place; nothing in objects nested too deep."""
        return Beside() if self.untracked else self.open[-1]

    def read(self, found: re.Match) -> None:
        """Go on over braces, or a label or score."""
        piece = found.group()
        if found.lastgroup == "open":
            new = min(len(piece), MAX_DEPTH - len(self.open))
            self.open += [Beside() for _ in range(new)]
            self.untracked += len(piece) - new
        elif found.lastgroup == "close":
            ended = max(len(piece) - self.untracked, 0)
            self.untracked = max(self.untracked - len(piece), 0)
            del self.open[max(len(self.open) - ended, 1):]
        elif len(self.open) > 1 and not self.untracked:
            _take_pair(self.open[-1], found)


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


def can_read_label(label: str) -> bool:
    """Whether the label, written as JSON, is short enough to be read back: escapes take several characters."""
    return bool(_LABELLED.fullmatch(f'"label": {json.dumps(label, ensure_ascii=False)}'))


def _take_pair(beside: Beside, found: re.Match) -> None:
    if found["name"] in LABEL_KEYS:
        rank = LABEL_KEYS.index(found["name"])
        if found["text"] and rank <= beside.rank:
            beside.label, beside.rank = read_string(found["text"]), rank
    elif found["number"] and number_fault(found["number"]) is None:
        beside.score = float(found["number"])


def _token_candidates(text: str) -> list[Candidate] | None:
    """Every pair of corners; a box token without corners and an end is malformed. None when there are too many."""
    candidates: list[Candidate] = []
    unfilled = text.count("<|box_start|>")
    beside = Beside()
    for found in _TOKEN_PIECE.finditer(text):
        if found["ref"] is not None:
            beside = Beside(found["ref"])
            continue
        is_marked = found["start"] is not None
        if is_marked and found["end"] is None:
            continue
        unfilled -= is_marked
        candidates.append(Candidate(f"{found['low']},{found['high']}", "box_start" if is_marked else "", beside))
        if len(candidates) > 2 * MAX_BOXES:
            return None
    if unfilled or (candidates and pair_breaks_off(text)):
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
