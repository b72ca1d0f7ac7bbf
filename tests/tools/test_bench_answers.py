"""The bench of reading answers: it measures every reward and every hostile text, and starts at once."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from megavg.protocols.plugin import names_in

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "bench_answers.py")]


def test_it_measures_every_reward_and_every_text(tmp_path):
    result = subprocess.run([*TOOL, "--length", "20000", "--answers", "20", "--repeats", "1"], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    # On a machine with other work a ratio may come out wrong; then the line says so, and the exit code.
    assert result.returncode == any("not linear" in line for line in lines), result.stderr
    for name in names_in("megavg.rewards"):
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert float(line.split()[-1].replace(",", "")) > 0
    hostile = lines[lines.index("") + 2:]
    assert len(hostile) > 10 and all(line[26:].split()[0].replace(".", "").isdigit() for line in hostile)


def test_every_reader_is_timed():
    readers = [getattr(read, "func", read).__name__ for read in runpy.run_path(TOOL[1])["all_readers"]()]
    assert {"read_boxes", "read_points", "strict_format", "class_name", "says_none"} == set(readers)
    assert readers.count("strict_format") == 8


def test_help_comes_without_heavy_libraries():
    code = "import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path(sys.path.pop(), run_name='__main__')\n" \
           "except SystemExit: assert not {'torch', 'numpy', 'megavg'} & set(sys.modules), sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({TOOL[1]!r})\n{code}"],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--length" in result.stdout, result.stderr
