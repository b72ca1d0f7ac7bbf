"""Join several methods into one class: ``two_stage+dapo`` is DAPO under the two-stage entropy schedule."""

from __future__ import annotations

import dataclasses
import typing

from megavg.algorithms.base import Algorithm

REPLACED = ("surrogate", "explore", "perturbation")
"""What at most one of joined methods may define: they do not call ``super()``."""
_MARKS = ("[exact]", "[reported]", "[ours]")


def compose(names: list[str], classes: list[type[Algorithm]]) -> type[Algorithm]:
    """One class with the behaviour and the options of all; an earlier one goes before a later one.

    Its mark is the most cautious of theirs. Where two set an option of GRPO anew, the default of the first one holds.

    Raises:
        ValueError: one is named twice or learns from written answers, two replace the same thing, or two have
            different options of the same name.
    """
    if len(classes) == 1:
        return classes[0]
    joined = "+".join(names)
    if len(set(classes)) < len(classes):
        raise ValueError(f"algorithm.name={joined!r} names a method twice")
    for name, cls in zip(names, classes):
        if not cls.uses_rollouts:
            raise ValueError(f"algorithm.name={joined!r}: {name} learns from written answers and cannot be joined")
    # one that another is built on comes in with it, and would stand before it if it were a base of its own
    tops = {name: cls for name, cls in zip(names, classes)
            if not any(other is not cls and issubclass(other, cls) for other in classes)}
    if len(tops) == 1:
        return next(iter(tops.values()))
    for hook in REPLACED:
        owners = [name for name, cls in tops.items() if getattr(cls, hook) is not getattr(Algorithm, hook)]
        if len(owners) > 1:
            raise ValueError(f"algorithm.name={joined!r}: {' and '.join(owners)} each replace {hook}; name one of them")
    _refuse_homonyms(joined, tops)
    mark = max((cls.mark for cls in tops.values()), key=_MARKS.index)
    title = " joined with ".join(cls.__name__ for cls in tops.values())
    return type("+".join(cls.__name__ for cls in tops.values()), tuple(tops.values()), {
        "__doc__": f"{title}. {mark}", "mark": mark,
        "Config": _join_configs(tuple(cls.Config for cls in tops.values()))})


def _refuse_homonyms(joined: str, tops: dict[str, type[Algorithm]]) -> None:
    """An option that two methods introduce apart from each other would be one number with two meanings."""
    owner_of: dict[str, tuple[type, str]] = {}
    for name, cls in tops.items():
        for field in dataclasses.fields(cls.Config):
            origin = [c for c in cls.Config.__mro__ if field.name in vars(c).get("__annotations__", {})][-1]
            first, other = owner_of.setdefault(field.name, (origin, name))
            if first is not origin:
                raise ValueError(f"algorithm.name={joined!r}: {other} and {name} each have an option {field.name} of "
                                 "their own and cannot be joined")


def _join_configs(configs: tuple[type, ...]) -> type:
    """A configuration with every option once. Plain inheritance would let the first one's inherited defaults win."""
    bases = tuple(dict.fromkeys(c for c in configs if not any(o is not c and issubclass(o, c) for o in configs)))
    plain = type("Config", bases, {})
    body: dict[str, typing.Any] = {"__annotations__": {}}
    for cls in reversed(plain.__mro__[1:]):
        hints = typing.get_type_hints(cls) if "__annotations__" in vars(cls) else {}
        for name in vars(cls).get("__annotations__", {}):
            field = cls.__dataclass_fields__[name]
            body["__annotations__"][name] = hints[name]
            body[name] = dataclasses.field(default=field.default, default_factory=field.default_factory)
    body["__doc__"] = "\n\n".join(cls.__doc__ or "" for cls in bases)
    return dataclasses.dataclass(frozen=True)(type("Config", bases, body))
