"""An independent reader of answers for the tests: slow, simple, and by ``json`` where the answer is JSON.

It says whether an answer holds what a reward may give credit for. It shares no code with ``megavg.ops``.
"""

from __future__ import annotations

import ast
import json
import math

TOKENS = "tokens_relative_1000"
BOX_KEYS = ("bbox_2d", "bbox")
POINT_KEYS = ("point_2d", "point", "points", "coordinate", "coordinates")
LABEL_KEYS = ("label", "class", "class_name", "category", "name")
EDGE = "\"'`.\u201c\u201d\u2018\u2019"


def answer_of(text: str) -> str:
    """What counts as the answer; empty while the model thinks."""
    text = text.split("</think>")[-1]
    if "<think>" in text and not text.strip().endswith("</answer>"):
        return ""
    return text.split("<answer>")[-1].split("</answer>")[0] if "<answer>" in text else text


def plain(text: str) -> str:
    """The answer without blanks and a code fence around it."""
    body = answer_of(text).strip()
    if body.startswith("```") and body.endswith("```") and len(body) > 6:
        body = body[3:-3].removeprefix("json").strip()
    return body


def number(part: str) -> float | None:
    """A plain finite decimal number of a sane size."""
    part = part.strip()
    if not part or not part.isascii() or "_" in part or len(part) > 64:
        return None
    try:
        value = float(part)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= 1e6 else None


def is_box(values: list) -> bool:
    """Four numbers, the corners in order."""
    return len(values) == 4 and None not in values and values[0] < values[2] and values[1] < values[3]


def is_place(values: list) -> bool:
    """A point, or a box that has a centre."""
    return is_box(values) or (len(values) == 2 and None not in values)


def decoded(text: str, start: int):
    """The list that begins at ``start``, by ``json``, its numbers read leniently; None where it is none."""
    written, word, depth = "", "", 0
    for char in text[start:]:
        if char not in "[],{}":
            word += char
            continue
        written += (json.dumps(number(word)) if word.strip() else "") + char
        word, depth = "", depth + {"[": 1, "]": -1}.get(char, 0)
        if depth == 0:
            break
    try:
        return json.loads(written)
    except ValueError:
        return None


def keyed_values(text: str, keys: tuple[str, ...]) -> list | None:
    """Every list of numbers under one of the keys; None where the value of one is something else."""
    found: list = []
    for key in keys:
        at = -1
        while (at := text.find(key, at + 1)) >= 0:
            before, rest = text[:at], text[at + len(key):]
            if before[-1:] == "_" or before[-1:].isalnum():
                continue
            quoted = rest[:1] in ("'", '"') and bool(rest)
            rest = rest[quoted:].lstrip()
            value = rest[1:].lstrip()
            if not rest.startswith(":") or not (quoted or value.startswith("[")):
                continue
            if key in ("points", "coordinates") and value[:1] == "[" and value[1:].lstrip()[:1] == "{":
                continue
            read = decoded(value, 0) if value.startswith("[") else None
            lists = read if isinstance(read, list) and read and isinstance(read[0], list) else [read]
            if not all(isinstance(each, list) and each and all(isinstance(v, float) for v in each) for each in lists):
                return None
            found += lists
    return found


def bare_lists(text: str) -> list:
    """Lists without lists inside, wherever they stand."""
    values = [decoded(text, at) for at, char in enumerate(text) if char == "["]
    return [each for each in values if isinstance(each, list)]


def in_parentheses(text: str) -> list[list]:
    """The numbers of every pair of parentheses."""
    groups = [chunk.split(")")[0] for chunk in text.split("(")[1:] if ")" in chunk]
    return [[number(part.split("=")[-1] if part.strip()[:1] in tuple("xy") else part) for part in group.split(",")]
            for group in groups]


def between_tokens(text: str, is_point: bool) -> bool:
    """Whether every box token is followed by a whole box (or point) and the token that ends it."""
    for piece in text.split("<|box_start|>")[1:]:
        inside, end, _ = piece.partition("<|box_end|>")
        groups = in_parentheses(inside)
        values = [value for group in groups for value in group]
        if not end or not inside.strip().startswith("(") or not inside.strip().endswith(")"):
            return False
        if not is_box(values) and not (is_point and is_place(values)):
            return False
    return True


def has_box(text: str, box_format: str) -> bool:
    """Whether an answer holds a complete box, and no malformed one that is marked as a box."""
    body = answer_of(text)
    if box_format == TOKENS:
        if "<|box_start|>" in body:
            return between_tokens(body, is_point=False)
        groups = in_parentheses(body)
        return any(is_box(a + b) for a, b in zip(groups, groups[1:]))
    values = keyed_values(body, BOX_KEYS)
    return values is not None and (all(map(is_box, values)) if values else any(map(is_box, bare_lists(body))))


def has_point(text: str, box_format: str) -> bool:
    """Whether an answer holds a complete point or box, and no malformed one that is marked as such."""
    body = answer_of(text)
    if box_format != TOKENS:
        points, boxes = keyed_values(body, POINT_KEYS), keyed_values(body, BOX_KEYS)
        if points is None or boxes is None:
            return False
        if points or boxes:
            return all(map(is_place, points)) if points else all(map(is_box, boxes))
        if any(map(is_place, bare_lists(body))):
            return True
    if "<|box_start|>" in body:
        return between_tokens(body, is_point=True)
    groups = in_parentheses(body)
    return any(map(is_place, groups)) or any(is_box(a + b) for a, b in zip(groups, groups[1:]))


def has_class(text: str, name: str) -> bool:
    """Whether the whole answer is the name, or one object with the name under one label."""
    body = plain(text)
    letters = body.casefold()
    while letters and (letters[0].isspace() or letters[0] in EDGE):
        letters = letters[1:]
    while letters and (letters[-1].isspace() or letters[-1] in EDGE):
        letters = letters[:-1]
    if letters == name:
        return True
    for read in (lambda: json.loads(body, strict=False), lambda: ast.literal_eval(body)):
        try:
            answer = read()
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(answer, dict):
            labels = [value for key, value in answer.items() if key in LABEL_KEYS]
            return len(labels) == 1 and isinstance(labels[0], str) and has_class(labels[0], name)
    return False


def has_form(text: str, box_format: str, task: str) -> bool:
    """Whether the whole text is one answer of the task."""
    if task == "classification":
        thought, ended, rest = text.strip().removeprefix("<think>").partition("</think>")
        is_empty = text.strip().startswith("<think>") and ended and not thought.strip(" \t\n\r")
        return bool(plain(text)) and "<think>" not in (rest if is_empty else text)
    if task == "detection" and plain(text) == "None":
        return True
    if box_format == TOKENS:
        return has_point(text, box_format) if task == "point" else has_box(text, box_format)
    try:
        answer = json.loads(plain(text))
    except (ValueError, RecursionError):
        return False
    key, fits = ("point_2d", lambda values: len(values) == 2) if task == "point" else ("bbox_2d", is_box)
    objects = answer if isinstance(answer, list) else [answer]
    return (bool(objects) or task == "detection") and all(isinstance(each, dict) and fits(each.get(key, ())) for each in objects)
