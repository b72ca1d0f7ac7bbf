"""The rooms of the house: who may import whom, how long a file may be, and that everything says what it does."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "megavg").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# Room -> the rooms it may import, beside itself. One way: no room reaches itself through others.
MAY_IMPORT = {
    "protocols": set(),
    "ops": {"protocols"},
    "parallel": {"protocols", "ops"},
    "checkpoint": {"protocols", "parallel"},
    "models": {"protocols", "ops", "parallel", "checkpoint"},
    "data": {"protocols", "ops"},
    "rewards": {"protocols", "ops"},
    "algorithms": {"protocols", "ops"},
    "rollout": {"protocols", "ops", "parallel", "checkpoint", "models"},
    "evaluation": {"protocols", "ops", "data", "rewards"},
    "trainer": {"protocols", "ops", "parallel", "checkpoint", "models", "data", "rewards", "algorithms", "rollout",
                "evaluation"},
    "train": {"trainer", "parallel"},
    "evaluate": {"trainer", "parallel"},
}
# A library -> the only rooms that may import it.
HOMES = {
    "deepspeed": {"parallel"},
    "megatron": {"parallel", "models", "rollout", "checkpoint"},
    "transformers": {"models", "data", "rollout"},
    "webdataset": {"data"},
    "vllm": {"rollout"},
}
# Rooms -> libraries that may not be imported at the top of their modules: a typo is answered before these are loaded.
LATE = {"algorithms": {"torch"}, "rewards": {"torch"}, "train": {"torch", "megavg"},
        "evaluate": {"torch", "megavg"}}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "megavg").with_suffix("").parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere below ``tree``, imports inside functions included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_imports(path: Path) -> set[str]:
    """What importing the module imports: everything outside functions and TYPE_CHECKING blocks."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found |= imports(node)
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_map_goes_one_way():
    for room in MAY_IMPORT:
        seen, todo = set(), set(MAY_IMPORT[room])
        while todo:
            seen |= todo
            todo = set().union(*(MAY_IMPORT[other] for other in todo)) - seen
        assert room not in seen


def test_every_room_is_on_the_map():
    rooms = {room_of(path) for path in PACKAGE} - {"__init__"}
    assert rooms <= set(MAY_IMPORT), "a new room needs a line in MAY_IMPORT and in the README's map"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    if room == "__init__":
        assert not imports(ast.parse(path.read_text()))
        return
    names = imports(ast.parse(path.read_text()))
    rooms = {name.split(".")[1] for name in names if name.startswith("megavg.")} - {room}
    assert rooms <= MAY_IMPORT[room], f"{room} may import {sorted(MAY_IMPORT[room])}"
    for library, homes in HOMES.items():
        if any(name.split(".")[0] == library for name in names):
            assert room in homes, f"{library} is imported outside of {sorted(homes)}"
    assert not any(name.split(".")[0] in ("tests", "tools") for name in names)


@pytest.mark.parametrize("path", [p for p in PACKAGE if room_of(p) in LATE], ids=relative)
def test_heavy_libraries_are_imported_late(path):
    late = LATE[room_of(path)]
    assert not {name for name in top_imports(path) if name.split(".")[0] in late}


def test_the_reader_of_imports_sees_lazy_ones():
    tree = ast.parse("import a.b\ndef f():\n    from c import d\n    class G:\n        import e")
    assert imports(tree) == {"a.b", "c", "c.d", "e"}
    with pytest.raises(AssertionError, match="relative import"):
        imports(ast.parse("from . import x"))


def test_algorithms_rewards_and_ops_run_with_torch_alone():
    heavy = sorted({*HOMES, "PIL", "safetensors"})
    code = ("import importlib, sys\n"
            f"heavy = {heavy!r}\n"
            "sys.modules.update({name: None for name in heavy})\n"  # importing one of them fails
            "for name in sys.argv[1:]:\n    importlib.import_module(name)\n")
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE
             if room_of(p) in ("protocols", "ops", "rewards", "algorithms") and p.name != "__init__.py"]
    result = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_sizes_of_files():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in PACKAGE + TOOLS}
    assert not {name: n for name, n in lengths.items() if n > 400}
    assert statistics.median(n for n in lengths.values() if n) < 180


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=relative)
def test_functions_are_short_and_lines_fit(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length < 60, f"{node.name} has {length} lines"
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
    assert not text or text.endswith("\n") and not text.endswith("\n\n")


@pytest.mark.parametrize("path", [p for p in PACKAGE + TOOLS if p.read_text().strip()], ids=relative)
def test_everything_public_is_documented(path):
    """Modules, and the classes and functions of the package; a tool's functions are nobody else's."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]
    if path in PACKAGE:
        assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_types_are_written_down(path):
    text = path.read_text()
    if text.strip() and "def " in text:
        assert "from __future__ import annotations" in text


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; every file where there is no git, as in an unpacked archive."""
    result = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git work tree")
    return [ROOT / name for name in result.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_path_of_somebodys_machine():
    pattern = re.compile(rb"(?<![\w.$}/])/(work|tmp|home|root|Users|mnt)/\w+")
    here = Path(__file__).name
    found = []
    for path in tracked_files():
        if path.suffix in (".png", ".jpg", ".tar") or path.name == here:
            continue
        found += [f"{relative(path)}: {match.group().decode()}" for match in pattern.finditer(path.read_bytes())]
    assert not found


def test_modules_are_named_like_no_other():
    """A module named like one of the standard library would hide it where its folder is on the path."""
    assert not [relative(p) for p in PACKAGE + TOOLS if p.stem in sys.stdlib_module_names and p.parent.name in
                ("megavg", "tools")]
