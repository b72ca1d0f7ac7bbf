"""The formats tools/make_shards.py reads: each is a module with ``read``, whose arguments become its options."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterable, Iterator, Mapping

READERS = "megavg.data.readers"
# name -> (module, what it is). VLM-R1 and LLaVA write their rows alike; --frame says where they differ.
MODULES: dict[str, tuple[str, str]] = {
    "scenes": ("megavg.data.builder.scenes", "drawn scenes of coloured shapes"),
    "jsonl": (f"{READERS}.jsonl", "a JSONL file of pictures with boxes"),
    "coco": (f"{READERS}.coco", "a COCO instances file"),
    "refcoco": (f"{READERS}.refcoco", "the refs pickle of RefCOCO, RefCOCO+ or RefCOCOg"),
    "voc": (f"{READERS}.voc", "a Pascal VOC folder"),
    "screenspot": (f"{READERS}.screenspot", "ScreenSpot, ScreenSpot-v2 or ScreenSpot-Pro"),
    "vlm_r1": (f"{READERS}.conversations", "VLM-R1's questions and answers with boxes"),
    "llava": (f"{READERS}.conversations", "LLaVA-style conversations with boxes"),
    "parquet": (f"{READERS}.parquet", "a Hugging Face data set on disk, as parquet files"),
}
_COMMON = ("seed",)  # arguments of ``read`` that are options of the tool as a whole


@dataclass(frozen=True)
class Argument:
    """One argument of a reader: its kind is the type it is written with, without "None"."""

    name: str
    kind: str
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def option(self) -> str:
        """As written on the command line; a switch that is on by default is turned off with --no-..."""
        return ("--no-" if self.kind == "bool" and self.default is True else "--") + self.name.replace("_", "-")


class Format:
    """A source of samples: its one-line description, its arguments, and the drafts it reads."""

    def __init__(self, name: str):
        module, self.help = MODULES[name]
        read = importlib.import_module(module).read
        self._read: Callable[..., Iterable[Any]] = read
        texts = _argument_texts(read.__doc__ or "")
        parameters = inspect.signature(read).parameters.values()
        self._takes = {parameter.name for parameter in parameters}
        self.arguments = [Argument(parameter.name, _kind(str(parameter.annotation)), parameter.default,
                                   texts.get(parameter.name, ""))
                          for parameter in parameters if parameter.name not in _COMMON]

    def drafts(self, args: argparse.Namespace) -> Iterable[Any]:
        """Read with the options that were given; the others keep the reader's own defaults."""
        given = {argument.name: getattr(args, argument.name) for argument in self.arguments
                 if hasattr(args, argument.name)}
        common = {name: getattr(args, name) for name in _COMMON if name in self._takes}
        return self._read(**given, **common)


def load_formats() -> dict[str, Format]:
    """All formats, by name."""
    return {name: Format(name) for name in MODULES}


def _kind(annotation: str) -> str:
    return re.sub(r"\s*\|\s*None$", "", annotation)


def _argument_texts(docstring: str) -> dict[str, str]:
    """What the Args section says of each argument, without the marks of markup."""
    found: dict[str, str] = {}
    section = re.search(r"\n    Args:\n(.*?)(?:\n    \w+:\n|\Z)", docstring, re.DOTALL)
    entries = re.compile(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", re.MULTILINE)
    for entry in entries.finditer(section.group(1) if section else ""):
        # A reader says what None means; on the command line that is what happens without the option.
        text = re.sub(r"\bNone(?=:)|\bNone(?= takes)", "default", " ".join(entry.group(2).replace("`", "").split()))
        found |= {name.strip(): text for name in entry.group(1).split(",")}
    return found


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return number


def names(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def named_texts(text: str) -> dict[str, str]:
    """name=text,name=text,...: fields for every record that the record does not use itself."""
    from megavg.data.sample import RECORD_FIELDS

    found = dict(part.partition("=")[::2] for part in names(text))
    for name, value in found.items():
        if not name or not value:
            raise argparse.ArgumentTypeError(f"{text!r} is not name=text,name=text,...")
        if name in RECORD_FIELDS:
            raise argparse.ArgumentTypeError(f"{name!r} is the record's own; name it otherwise")
    return found


def with_fields(drafts: Iterable[Any], fields: Mapping[str, str]) -> Iterator[Any]:
    """Drafts whose records say ``fields`` too, before what their source says under the same name."""
    for draft in drafts:
        yield replace(draft, fields={**draft.fields, **fields}) if fields else draft


_PARSERS: Mapping[str, dict[str, Any]] = {
    "str": {"metavar": "TEXT"}, "int": {"type": whole, "metavar": "N"}, "float": {"type": not_negative, "metavar": "X"},
    "Sequence[str]": {"type": names, "metavar": "A,B,..."}, "list[str]": {"type": names, "metavar": "A,B,..."},
    "tuple[str, ...]": {"type": names, "metavar": "A,B,..."},
}


def add_source_options(parser: argparse.ArgumentParser, formats: Mapping[str, Format]) -> None:
    """Add the options that single formats read; each is absent from the result unless it is given."""
    group = parser.add_argument_group("options of single formats")
    users: dict[str, list[tuple[str, Argument]]] = {}
    for name, chosen in formats.items():
        for argument in chosen.arguments:
            users.setdefault(argument.option, []).append((name, argument))
    for option, found in users.items():
        # One text where the formats agree, else one for each.
        texts = dict.fromkeys(argument.help for _, argument in found)
        text = " / ".join(f"[{', '.join(name for name, argument in found if argument.help == told)}] {told}"
                          for told in texts).replace("%", "%%")
        first = found[0][1]
        if any(argument.kind != first.kind for _, argument in found):
            raise TypeError(f"{option} has several types: {[(name, argument.kind) for name, argument in found]}")
        if first.kind == "bool":
            action = {"action": "store_const", "const": first.default is not True}
        else:
            action = _PARSERS[first.kind]
        group.add_argument(option, dest=first.name, default=argparse.SUPPRESS, help=text, **action)


def check_source_options(parser: argparse.ArgumentParser, args: argparse.Namespace,
                         formats: Mapping[str, Format]) -> None:
    """Refuse options that the chosen format does not read, and missing ones."""
    own = {argument.name: argument for argument in formats[args.format].arguments}
    for other in formats.values():
        for argument in other.arguments:
            if hasattr(args, argument.name) and argument.name not in own:
                parser.error(f"{argument.option} does not belong to --format {args.format}")
    for argument in own.values():
        if argument.required and not hasattr(args, argument.name):
            parser.error(f"--format {args.format} needs {argument.option}")
