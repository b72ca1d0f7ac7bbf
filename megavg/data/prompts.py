"""What the model is asked: a text for each task, the family's own unless the configuration gives another.

The texts lie as data files in the folder ``prompt_texts``, one for each family, with their sources. A text holds
``{expression}``, which a sample's expression replaces; every other brace is written twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Mapping

from megavg.protocols.plugin import nearest
from megavg.protocols.sample import TASKS, Sample

THINK = "_think"
NAMES = tuple(task + suffix for task in TASKS for suffix in ("", THINK))
"""The names of a file's texts: each task as it is, and with thoughts before the answer."""

_FOLDER = Path(__file__).with_name("prompt_texts")


def check_text(text: object, where: str) -> None:
    """Raise ValueError, naming the option ``where``, unless ``{expression}`` and nothing else can be filled in."""
    try:
        if "EXPRESSION" not in text.format(expression="EXPRESSION"):
            raise ValueError("it does not hold {expression}")
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}={text!r} cannot be filled in ({error}); write {{expression}} where the expression "
                         "goes and double every other brace") from error


def check_texts(texts: Mapping[object, object], names: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless ``texts`` maps some of ``names`` to texts that can be filled in."""
    for name, text in texts.items():
        if name not in names:
            raise ValueError(f"{where}: there is no task {name!r}{nearest(str(name), names)}")
        check_text(text, f"{where}.{name}")


def read_texts(path: str | os.PathLike) -> dict[str, str]:
    """Read a YAML file that maps some of ``NAMES`` to texts.

    Raises:
        ValueError: it cannot be read, is no such mapping, or holds a text that cannot be filled in.
    """
    import yaml

    try:
        texts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise ValueError(f"cannot read the prompts of {path}: {problem}; give a YAML file with lines such as "
                         "\"rec: Locate {expression}.\"") from error
    if not isinstance(texts, dict):
        raise ValueError(f"{path}: expected a mapping of tasks to texts, got {type(texts).__name__}; the tasks are "
                         f"{', '.join(NAMES)}")
    check_texts(texts, NAMES, str(path))
    return texts


class Prompts:
    """The questions of a run.

    A text comes from the first of these that has one: ``prompt`` (for every task), ``prompts`` (by task),
    ``prompts_file`` and the family's own file; of the files, the ``_think`` texts with ``thinking``.

    Args:
        family: HF's ``model_type``, as in "qwen2_5_vl".
        prompt, prompts, prompts_file, thinking: the options of that name of the configuration's section ``data``.

    Attributes:
        texts: task -> its text.
        sources: task -> where that comes from, for the log.
        thinking: whether an answer is written as ``<think>...</think><answer>...</answer>``.

    Raises:
        ValueError: a text that cannot be filled in, a task that does not exist, a file that cannot be read, or a family
            without texts of its own where one is needed.
    """

    def __init__(self, family: str, prompt: str = "", prompts: Mapping[str, str] | None = None,
                 prompts_file: str = "", thinking: bool = False):
        self.thinking = thinking
        own = _FOLDER / f"{family}.yaml"
        found = [(own.name, read_texts(own))] if own.is_file() else []
        if prompts_file:
            found.insert(0, (prompts_file, read_texts(prompts_file)))
        suffix = THINK if thinking else ""
        found = [(source, {name.removesuffix(THINK): text for name, text in texts.items()
                           if name.endswith(THINK) == thinking}) for source, texts in found]
        if prompts_file and not found[0][1]:
            raise ValueError(f"{prompts_file} holds no text for data.thinking={str(thinking).lower()}: names "
                             f"{'' if thinking else 'not '}ending in {THINK!r} are taken; add one, or set "
                             f"data.thinking={str(not thinking).lower()}")
        check_texts(prompts or {}, TASKS, "data.prompts")
        found.insert(0, ("data.prompts", dict(prompts or {})))
        if prompt:
            check_text(prompt, "data.prompt")
            found.insert(0, ("data.prompt", dict.fromkeys(TASKS, prompt)))
        self.texts: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        for task in TASKS:
            first = next(((source, texts[task]) for source, texts in found if task in texts), None)
            if first is None:
                raise ValueError(f"there is no prompt {task + suffix!r} for the family {family!r}; give data.prompt, "
                                 "data.prompts or data.prompts_file")
            self.sources[task], self.texts[task] = first

    def question(self, sample: Sample) -> str:
        """The text that goes with the image of ``sample``."""
        return self.texts[sample.task].format(expression=sample.expression)
