"""The command line of the tiny-checkpoint maker, started as a file from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_tiny_checkpoint.py"
SIZES = ["--hidden-size", "32", "--num-layers", "1", "--vision-depth", "1", "--vision-heads", "2"]


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_help_answers_in_under_a_second(tmp_path):
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        result = run(tmp_path, "--help")
        durations.append(time.perf_counter() - start)
        assert result.returncode == 0 and "--tokenizer" in result.stdout
    assert min(durations) < 1.0


def test_options_reach_the_checkpoint(tmp_path):
    result = run(tmp_path, "--family", "qwen3_vl", "--out", "out/tiny", *SIZES, "--head-dim", "16", "--vocab-size",
                 "600", "--tie-embeddings", "--dtype", "bfloat16", "--tokenizer", "sentencepiece", "--max-pixels",
                 "65536")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert config["text_config"]["vocab_size"] == 600 and config["text_config"]["head_dim"] == 16
    assert (folder / "tokenizer.model").is_file()
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 65536
    assert not list(tmp_path.glob("**/*.tmp"))
    assert result.stderr == ""


@pytest.mark.parametrize("arguments, message", [
    (["--num-kv-heads", "3"], "num_heads=4 is not divisible by num_kv_heads=3"),
    (["--out", "."], "--overwrite"),
])
def test_mistakes_are_told_in_one_line(tmp_path, arguments, message):
    (tmp_path / "file").write_text("kept")
    result = run(tmp_path, "--family", "qwen2_vl", "--out", "tiny", *SIZES, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
