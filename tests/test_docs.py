"""The pages in docs/: their Python runs, their commands know their options, and the files they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES
            for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]


def test_there_are_pages():
    assert PAGES and blocks("python") and blocks("bash")


@pytest.mark.parametrize("page, code", blocks("python"))
def test_python_runs_with_torch_alone(page, code):
    """With the heavy libraries hidden, as somebody has it who only wants the op."""
    hide = "import sys\nsys.modules.update({n: None for n in ('deepspeed', 'megatron', 'transformers', 'webdataset')})\n"
    done = subprocess.run([sys.executable, "-c", hide + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page, line", [(page, line.split("#")[0].strip()) for page, block in blocks("bash")
                                        for line in block.splitlines() if "tools/" in line])
def test_tools_know_their_options(page, line):
    words = shlex.split(line)
    tool = next(word for word in words if word.startswith("tools/"))
    shown = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert not [word for word in words if word.startswith("--") and word not in shown.stdout]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist_and_no_figure_is_left_to_fill_in(page):
    text = page.read_text()
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", text)
    named = re.findall(r"`((?:megavg|tools|examples|tests|docs)/[\w./]+)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]
