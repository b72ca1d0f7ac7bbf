"""Strict configuration: a YAML file and dotted overrides become frozen dataclasses, or one clear error.

An unknown key is an error that names the nearest known one; a value of the wrong type is an error that names the key,
what was expected and what was got. Standard library and PyYAML only: a typo is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from megavg.protocols.plugin import nearest


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and the remedy."""


def read_yaml(path: str | Path) -> dict:
    """Read one YAML file whose top level is a mapping."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top, got {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict, overrides: list[str]) -> dict:
    """Return a copy of ``tree`` with every ``section.key=value`` of ``overrides`` set; values are read as YAML."""
    import copy

    import yaml

    tree = copy.deepcopy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"cannot read {override!r}: an override is written section.key=value")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            if node.get(parent) is None:  # a section that the file leaves out or leaves empty
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ConfigError(f"cannot set {key}: {parent} is not a section")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read the value {text!r} as YAML; put quotes around a text") from error
    return tree


def read_command_line(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """The tree that ``--config FILE section.key=value ...`` says; ``parser`` brings the program's name and help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="YAML file with the options")
    # what launchers pass before the user's arguments
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options set after the file is read")
    arguments = parser.parse_intermixed_args(argv)
    return apply_overrides(read_yaml(arguments.config), arguments.overrides)


def build(cls: type, tree: Any, path: str = "") -> Any:
    """Make the dataclass ``cls`` from a mapping, strictly; ``path`` is the dotted prefix used in errors."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'configuration'}: expected a section, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"unknown option {where}{nearest(str(key), fields)}")
        values[key] = convert(hints[key], value, where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"missing option {f'{path}.{name}' if path else name}: it has no default")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against the type ``hint`` and return it converted (int to float, list to tuple)."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if isinstance(value, bool) and {"off", "on"} & set(choices):  # YAML 1.1 reads these words as booleans
            value = "on" if value else "off"
        if value not in choices:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}"
                              f"{nearest(str(value), map(str, choices))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, {} if value is None else value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return origin(convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    wrong = ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-6 as text
            return float(value)
        except ValueError:
            raise wrong from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise wrong
    return value


def to_tree(config: Any) -> Any:
    """The inverse of ``build``: nested dataclasses as plain dicts and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, (list, tuple)):
        return [to_tree(item) for item in config]
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    return config
