"""Find a plug-in by name: the folder is the registry, and a dotted name reaches modules outside the package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil


def nearest(name: str, known) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def names_in(package: str) -> list[str]:
    """Names of the plug-in modules in ``package``: its modules except ``base``."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_"))


def load_module(package: str, name: str, option: str):
    """Import plug-in ``name`` of ``package``, or the module that a dotted ``name`` says.

    ``option`` is the configuration key that held the name; the error names it.
    """
    if "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{option}={name!r}: cannot import module {error.name!r}; "
                             "is its folder on PYTHONPATH?") from error
    known = names_in(package)
    if name not in known:
        raise ValueError(f"{option}={name!r} does not exist{nearest(name, known)}")
    return importlib.import_module(f"{package}.{name}")
