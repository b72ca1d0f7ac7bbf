"""Read the class that an answer names, and whether it says that there is nothing."""

from __future__ import annotations

import json
import re

from megavg.ops.box_scan import LABEL_KEYS, read_string
from megavg.ops.text_parts import MAX_LABEL, answer_part, without_fence

_QUOTES = "\"'`\u201c\u201d\u2018\u2019"
_SINGLE_QUOTED = re.compile(rf"\{{\s*'(?:{'|'.join(LABEL_KEYS)})'\s*:\s*(?P<name>'(?:[^'\\\n]|\\.)*')\s*\}}")
_NOTHING = re.compile(r"(?:none|null|\[\s*\]|\{\s*[\"']objects[\"']\s*:\s*\[\s*\]\s*\})\.?", re.IGNORECASE)


def says_none(text: str) -> bool:
    """True when the answer says that nothing is there: ``None``, ``null``, ``[]`` or ``{"objects": []}``.

    An empty answer says nothing at all: False.
    """
    body = _body(text)
    return body is not None and len(body) <= MAX_LABEL and bool(_NOTHING.fullmatch(body.strip(_QUOTES)))


def class_name(text: str) -> str:
    """The class that the answer names, as :func:`normal_name` writes it; "" when it names none, or several.

    The answer is the name, or one JSON object and nothing else, plain or in a code fence, inside ``<answer>`` or after
    ``</think>`` where these are there. The object has the name under ``label``, ``class``, ``class_name``,
    ``category`` or ``name``, and holds just one of these keys, at any depth; ``{'label': 'king'}`` counts too. A text
    that begins with a brace or a bracket and is no such object names nothing.
    """
    body = _body(text)
    if body is None or len(body) > 4 * MAX_LABEL:
        return ""
    if not body.startswith(("{", "[")):
        return normal_name(body)
    single = _SINGLE_QUOTED.fullmatch(body)
    return normal_name(read_string(single["name"]) if single else _label_of(body))


def _label_of(body: str) -> str:
    """The one label of a JSON object; "" for every other text."""
    labels = []

    def collect(pairs: list) -> dict:
        labels.extend(value for key, value in pairs if key in LABEL_KEYS)
        return dict(pairs)

    try:
        # The hook sees the keys that are written twice, of which a dict keeps one.
        answer = json.loads(body, object_pairs_hook=collect, strict=False)
    except (ValueError, RecursionError):
        return ""
    of_its_own = isinstance(answer, dict) and any(key in answer for key in LABEL_KEYS)
    return labels[0] if of_its_own and len(labels) == 1 and isinstance(labels[0], str) else ""


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
