"""Find a plug-in by name: the folder is the registry; a dotted name or a file reaches modules outside the package."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType


def nearest(name: str, known) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def names_in(package: str) -> list[str]:
    """Names of the plug-in modules in ``package``: its modules except ``base``."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_"))


def load_module(package: str, name: str, option: str) -> ModuleType:
    """Import plug-in ``name`` of ``package``, or the module of a dotted ``name``, or the file of a name ending in .py.

    A relative path begins at the current folder. A file is loaded once: naming it again gives the same module.

    Args:
        package: home of the built-in plug-ins, such as ``megavg.rewards``.
        name: ``iou``, ``my_package.my_reward`` or ``rewards/mine.py``.
        option: the configuration key that held the name; every error names it.

    Raises:
        ValueError: there is no such plug-in, module or file, or it fails (or ends the program) while it is loaded.
    """
    if name.endswith(".py"):
        return _load_file(name, option)
    if "." in name:
        return _load_dotted(name, option)
    known = names_in(package)
    if name not in known:
        raise ValueError(f"{option}={name!r} does not exist{nearest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def short_name(name: str) -> str:
    """How a plug-in is called in metrics: of a file, its name without folder and ".py"; else its name as it is."""
    return Path(name).stem if name.endswith(".py") else name


def _load_dotted(name: str, option: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{option}={name!r}: expected a dotted name such as my_package.my_reward, or the path of a "
                         "file ending in .py")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{option}={name!r}: cannot import module {error.name!r}; "
                         "is its folder on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option}={name!r}: the module {name} fails while it is loaded: "
                         f"{type(error).__name__}: {error}") from error


def _load_file(name: str, option: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{option}={name!r}: there is no file {path}; a relative path begins at the current folder, "
                         f"{Path.cwd()}")
    # The path is part of the module's name, so that two files of one name are two modules.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    module_name = f"megavg_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up while it is loaded
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{option}={name!r}: the file {path} fails while it is loaded: "
                         f"{type(error).__name__}: {error}") from error
    return module
