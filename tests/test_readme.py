"""README's commands and links are real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    inline = re.findall(r"`((?:make|deepspeed|tools/\S+\.py|python) [^`]+)`", TEXT)
    return [line.split("#")[0].strip() for line in lines + inline if line.strip()]


def test_no_figure_is_left_to_fill_in():
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", TEXT)


def test_there_are_commands():
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_targets_exist(command):
    """``make -n`` says what it would run."""
    words = [word for word in shlex.split(command) if word != "..."]
    shown = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("command", [c for c in commands() if "tools/" in c])
def test_tools_know_their_options(command):
    words = shlex.split(command)
    tool = next(word for word in words if word.startswith("tools/"))
    shown = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.stdout, f"{tool} has no {option}"


@pytest.mark.parametrize("command", [c for c in commands() if "megavg/train.py" in c and "--config" in c])
def test_training_overrides_are_options(command):
    """The overrides of each README training fit the strict configuration (my.yaml stands for the user's own)."""
    from megavg.trainer.config import parse_command_line

    words = shlex.split(command)
    overrides = [word for word in words[words.index("--config") + 2:] if "=" in word]
    assert parse_command_line(["--config", str(ROOT / "examples/demo.yaml"), *overrides])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:megavg|tools|examples|tests)/[\w./]+)`", TEXT))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT))
def test_pictures_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("demo*.yaml")), ids=lambda path: path.name)
def test_examples_fit_the_configuration(example):
    from megavg.protocols.config import read_yaml
    from megavg.trainer.config import resolve

    assert resolve(read_yaml(example)).algorithm_name
