"""Say whether a text is exactly one well-formed answer of a task, in the form of a model family."""

from __future__ import annotations

import re

from megavg.ops.box_formats import TOKENS, check_format
from megavg.ops.box_scan import read_boxes
from megavg.ops.class_text import class_name
from megavg.ops.point_scan import read_points
from megavg.ops.text_parts import inside_wrapper, without_fence
from megavg.protocols.plugin import nearest
from megavg.protocols.sample import TASKS

_NUMBER = r"-?(?:0|[1-9][0-9]{0,6})(?:\.[0-9]{1,6})?"
_LABEL = r'"label"\s*:\s*"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_SCORE = r'"(?:score|confidence)"\s*:\s*(?:0|[1-9][0-9]{0,6})(?:\.[0-9]{1,20})?'


def _numbers(count: int) -> str:
    return rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{{count - 1}}}\s*\]"


def _objects(key: str, count: int, label: str = "?") -> str:
    """One object or a list of them: the numbers under ``key`` and a label before or after them."""
    value = rf'"{key}"\s*:\s*{_numbers(count)}'
    if label == "?":
        one = rf"\{{\s*(?:{_LABEL}\s*,\s*)?{value}(?:\s*,\s*{_LABEL})?\s*\}}"
    else:
        one = rf"\{{\s*(?:{_LABEL}\s*,\s*{value}|{value}\s*,\s*{_LABEL})(?:\s*,\s*{_SCORE})?\s*\}}"
    return rf"{one}|\[\s*{one}(?:\s*,\s*{one})*\s*\]"


_CORNER = rf"\({_NUMBER},\s?{_NUMBER}\)"
_TOKEN_BOX = rf"<\|box_start\|>{_CORNER},\s?{_CORNER}<\|box_end\|>"
_REFERENCE = r"<\|object_ref_start\|>(?:(?!<\|).){1,200}<\|object_ref_end\|>"
_CLASS_OBJECT = rf"\{{\s*{_LABEL}\s*\}}"
# how Qwen3 answers at once where the prompt opens a thought
_NO_THOUGHT = re.compile(r"\A<think>[ \t\n\r]*</think>[ \t\n\r]*")
_TAG = re.compile(r"</?(?:think|answer)>")
_JSON_FORMS = {"rec": _objects("bbox_2d", 4), "point": _objects("point_2d", 2),
               "detection": _objects("bbox_2d", 4, label="!") + "|None"}
_TOKEN_FORMS = {"rec": rf"(?:(?:{_REFERENCE})?{_TOKEN_BOX})+", "point": rf"(?:<\|box_start\|>{_CORNER}<\|box_end\|>)+",
                "detection": rf"(?:{_REFERENCE}(?:{_TOKEN_BOX})+\s?)+|None"}


def _compiled(form: str) -> re.Pattern:
    return re.compile(form.replace(r"\s", r"[ \t\n\r]"))  # the blanks of JSON


_FORMS = {is_tokens: {task: _compiled(form) for task, form in forms.items()}
          for is_tokens, forms in ((True, _TOKEN_FORMS), (False, _JSON_FORMS))}
_CLASS_FORM = _compiled(_CLASS_OBJECT)
_EMPTY_LIST = _compiled(r"\[\s*\]")


def strict_format(text: str, box_format: str, thinking: bool | None = None, task: str = "rec") -> str | None:
    """Say why the text is not exactly one well-formed answer; None when it is.

    ===============  ===========================================================  ====================================
    task             JSON formats, plain or in a ```` ```json ```` fence          token format
    ===============  ===========================================================  ====================================
    rec              ``{"bbox_2d": [four numbers]}`` or a list of them, each      one or more boxes between their box
                     with an optional string ``label``                            tokens, each perhaps after its name
    point            ``{"point_2d": [two numbers]}``, likewise                    one or more points, likewise
    detection        as rec, each with a ``label``, then an optional ``score``;   each object's boxes after its name
                     ``[]``, or ``None``                                          between reference tokens; or ``None``
    classification   one line with the name of a class, or                        the same
                     ``{"label": "name"}``
    ===============  ===========================================================  ====================================

    Args:
        text: the whole decoded answer.
        box_format: one of ``megavg.ops.box_formats.BOX_FORMATS``.
        thinking: True demands ``<think>...</think><answer>...</answer>`` around the answer, False forbids it (but for a
            thought that is empty), None takes either.
        task: one of ``megavg.protocols.sample.TASKS``.

    Raises:
        ValueError: an unknown format or task.
    """
    check_format(box_format)
    if task not in TASKS:
        raise ValueError(f"task {task!r} does not exist{nearest(task, TASKS)}")
    body = text.strip()
    if not body:
        return "empty answer"
    if thinking or (thinking is None and body.startswith("<think>") and not _NO_THOUGHT.match(body)):
        inside = inside_wrapper(body)
        if inside is None:
            return "no <think> and <answer>"
        body = inside
    else:
        body = _NO_THOUGHT.sub("", body, count=1)
    if box_format != TOKENS or task == "classification":
        body = without_fence(body)
    if task == "classification":
        return _class_fault(body)
    if task == "detection" and (body == "None" or box_format != TOKENS and _EMPTY_LIST.fullmatch(body)):
        return None
    read = read_points if task == "point" else read_boxes
    found, reason = read(body, box_format)
    if not found:
        return reason
    if _FORMS[box_format == TOKENS][task].fullmatch(body):
        return None
    return "text around the point" if task == "point" else "text around the boxes"


def _class_fault(body: str) -> str | None:
    if not class_name(body):
        return "no class"
    if body.startswith(("{", "[")):
        return None if _CLASS_FORM.fullmatch(body) else "text around the class"
    return "text around the class" if "\n" in body or _TAG.search(body) else None
