"""The command line of conversions: help and options, answered without loading anything large."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.convert_checkpoint import main, read_size

ROOT = Path(__file__).resolve().parents[2]


def test_help_answers_in_under_a_second(tmp_path):
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "--help"], cwd=tmp_path,
                                capture_output=True, text=True, timeout=60)
        durations.append(time.perf_counter() - start)
        assert result.returncode == 0 and "--max-shard-size" in result.stdout
    assert min(durations) < 1.0


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("2kb", 2000)])
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--max-shard-size", "0"], ["--max-shard-size", "5 apples"],
                                       ["--dtype", "int8"]])
def test_wrong_options(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["source", "out", *arguments])
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
