"""Read the class that an answer names, and whether it says that there is nothing."""

from __future__ import annotations

import re

from megavg.ops.box_scan import LABEL_KEYS, PAIR, read_string
from megavg.ops.text_parts import MAX_LABEL, answer_part, without_fence

_QUOTES = "\"'`\u201c\u201d\u2018\u2019"
_PAIR = re.compile(PAIR)
_NOTHING = re.compile(r"(?:none|null|\[\s*\]|\{\s*[\"']objects[\"']\s*:\s*\[\s*\]\s*\})\.?", re.IGNORECASE)


def says_none(text: str) -> bool:
    """True when the answer says that nothing is there: ``None``, ``null``, ``[]`` or ``{"objects": []}``.

    An empty answer says nothing at all: False.
    """
    body = _body(text)
    return body is not None and len(body) <= MAX_LABEL and bool(_NOTHING.fullmatch(body.strip(_QUOTES)))


def class_name(text: str) -> str:
    """The class that the answer names, as :func:`normal_name` writes it; "" when it names none, or several.

    The answer is the name, or one JSON object with the name under ``label``, ``class``, ``class_name``, ``category`` or
    ``name``, plain or in a code fence, inside ``<answer>`` or after ``</think>`` where these are there.
    """
    body = _body(text)
    if body is None or len(body) > 4 * MAX_LABEL:
        return ""
    if not body.startswith(("{", "[")):
        return normal_name(body)
    names = [found["text"] for found in _PAIR.finditer(body) if found["key"] in LABEL_KEYS and found["text"]]
    return normal_name(read_string(names[0])) if len(names) == 1 else ""


def normal_name(name: str) -> str:
    """A class name without regard to case, blanks, quotes around it and a final stop; "" for what is no name.

    Names that differ only in these are the same class: ``" 'The  King'. "`` and ``the king``.
    """
    name = " ".join(name.split()).strip(_QUOTES + " ").removesuffix(".").strip(_QUOTES + " ").casefold()
    return name if len(name) <= MAX_LABEL else ""


def _body(text: str) -> str | None:
    """The answer without what wraps it; None while the model is still thinking."""
    answer = answer_part(text)
    return None if answer is None else without_fence(answer.strip()).strip()
