"""Every command of README.md and docs/ is run here, run by another test, or needs a GPU, a cluster or many minutes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = {"tools/convert_checkpoint.py", "tools/inspect_checkpoint.py", "tools/report.py", "tools/make_shards.py",
        "tools/check_shards.py", "tools/make_tiny_checkpoint.py"}
ELSEWHERE = {  # how the command begins -> the test that runs it, or why none does
    "make demo": "tests/tools/test_run_demo.py runs it with fewer steps",
    "make test": "this is a part of it",
    "mpirun -n 8 python tools/make_shards.py": "tests/tools/test_make_shards.py, with 2 ranks",
    "deepspeed": "tests/trainer, tests/test_examples.py and tests/parallel/test_mpi.py; 8 GPUs are not at hand",
    "sbatch": "tests/slurm, on a Slurm of two virtual nodes",
    "bash slurm/train.sbatch --dry-run": "tests/slurm/test_slurm_scripts.py",
    "python tools/entropy_study.py": "tests/tools/test_entropy_study.py, a smaller one; the whole takes hours",
    "python tools/bench_": "tests/tools/test_bench_*.py, smaller; some need a GPU",
    "python tools/check_layouts.py": "tests/tools/test_check_layouts.py; 8 processes take minutes",
    "python tools/check_frame.py": "tests/trainer/test_frame_check_before_training.py, with a model that is at hand",
    "python tools/plan_layout.py": "tests/tools/test_plan_layout.py, with models that are at hand",
    "python tools/kill_test.py": "tests/trainer/test_kill.py, with fewer kills",
}


def commands() -> list[str]:
    """The lines of the pages' bash blocks, continued ones joined."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def runs_here(command: str) -> bool:
    words = shlex.split(command)
    return words[0] == "python" and words[1] in HERE


def test_no_command_is_left_out():
    assert sum(map(runs_here, commands())) >= 8
    assert [command for command in commands()
            if not runs_here(command) and not command.startswith(tuple(ELSEWHERE))] == []


def run_in(folder: str, line: str) -> object:
    """Exit status of a command, run in this process with its own name, arguments and folder."""
    os.chdir(folder)
    sys.argv = shlex.split(line)[1:]
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        return 0
    except SystemExit as left:
        return left.code or 0


@pytest.fixture(scope="module")
def folder(checkpoints, scene_shards, tmp_path_factory) -> Path:
    """A folder with what the pages' commands name: runs that are finished, annotations, shards."""
    folder = tmp_path_factory.mktemp("pages")
    tree = run_tree(checkpoints("qwen3_vl"), scene_shards(8), folder / "runs/demo/rl", "algorithm={name: sft}",
                    "trainer.num_steps=1", "trainer.save_every=1", "trainer.export_hf=true")
    run_ranks(1, train, tree)
    run = folder / "runs/demo/rl"
    for other in ("runs/demo/warmup", "runs/grpo", "runs/ecvgpo"):
        shutil.copytree(run, folder / other)
    (run / "checkpoints/step-000001").rename(run / "checkpoints/step-000100")
    shutil.copytree(scene_shards(8), folder / "data/test")
    pictures = ROOT / "examples/data/webdocs_gui"
    rows = [json.loads(line) for line in (pictures / "annotations.jsonl").read_text().splitlines()[:2]]
    (folder / "images").mkdir()
    for row in rows:
        shutil.copy(pictures / row["image"], folder / row["image"])
    (folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_others_run_as_they_are_written(folder):
    lines = [command for command in commands() if runs_here(command)]
    lines.sort(key=lambda line: "make_" not in line)  # what is looked at is made first
    lines = [line.replace("--processes 8", "--processes 2").replace("--workers 4", "--workers 1") for line in lines]
    found = {line: run_ranks(1, run_in, str(folder), line)[0] for line in lines}
    # two models that were trained differently are told apart by the exit status
    assert {line: code for line, code in found.items() if code and not (code == 1 and "warmup/hf" in line)} == {}
    assert (folder / "runs/demo/rl/report.html").exists() and (folder / "train.png").exists()
    assert (folder / "runs/step-hf/model.safetensors").exists()
