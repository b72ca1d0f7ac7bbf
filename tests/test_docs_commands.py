"""Every command of README.md and docs/ is run here, run by another test, or needs a GPU, a cluster or many minutes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, train, training_lines

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLURM_PAGE = ROOT / "slurm" / "README.md"  # its own commands are run by tests/slurm/test_slurm_scripts.py
LAPTOP = "deepspeed --num_gpus 2 megavg/train.py --config my.yaml model.path=runs/tiny"
HERE = {"tools/convert_checkpoint.py", "tools/inspect_checkpoint.py", "tools/report.py", "tools/make_shards.py",
        "tools/check_shards.py", "tools/make_tiny_checkpoint.py"}
ELSEWHERE = {  # how the command begins -> the test that runs it, or why none does
    "make demo": "tests/tools/test_run_demo.py runs it with fewer steps",
    "make test": "this is a part of it",
    "cp examples/my.yaml my.yaml": "the folder of these tests holds it",
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


def inline_commands() -> list[str]:
    """What stands between single backticks in running text and is a whole command."""
    texts = [re.sub(r"```.*?```", "", page.read_text(), flags=re.S) for page in [*PAGES, SLURM_PAGE]]
    found = [line for text in texts for line in re.findall(r"`([^`\n]+)`", text)]
    return list(dict.fromkeys(line for line in found if re.match(
        r"(deepspeed|mpirun|sbatch|bash|python|make) .*(\.py|\.sbatch|demo|setup|test)\b", line)))


def configured() -> list[tuple[str, list[str]]]:
    """(megavg/train.py or evaluate.py, its arguments) of every command of the pages that starts one, with a file."""
    slurm = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", SLURM_PAGE.read_text(), re.S)
             for line in block.splitlines()]
    found = []
    for line in [*commands(), *slurm, *inline_commands()]:
        words = shlex.split(line)
        place = next((i for i, word in enumerate(words) if re.fullmatch(
            r"megavg/(train|evaluate)\.py|slurm/(train|evaluate)\.sbatch", word)), None)
        if place is None:
            continue
        arguments = [word for word in words[place + 1:] if word not in ("--dry-run", "--config", "...")]
        if arguments and arguments[0].endswith(".yaml"):
            found.append((Path(words[place]).stem, arguments))
    return found


def runs_here(command: str) -> bool:
    words = shlex.split(command)
    return words[0] == "python" and words[1] in HERE


@pytest.mark.parametrize("entry, arguments", configured(), ids=lambda value: " ".join(value)[:60])
def test_options_of_every_training_and_evaluation_exist(entry, arguments):
    from megavg.trainer import config, evaluate_config

    parse = {"train": config, "evaluate": evaluate_config}[entry].parse_command_line
    path = "examples/my.yaml" if arguments[0] == "my.yaml" else arguments[0]
    assert parse(["--config", str(ROOT / path), *arguments[1:]])


def test_options_of_tools_in_running_text_exist():
    tools = [shlex.split(line) for line in inline_commands() if "tools/" in line]
    assert len(tools) > 8 and len(configured()) > 12
    known: dict[str, str] = {}
    for words in tools:
        tool = next(word for word in words if word.startswith("tools/"))
        if tool not in known:
            known[tool] = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True,
                                         check=True).stdout
        assert [word for word in words if word.startswith("--") and word not in known[tool]] == [], words


def test_no_command_is_left_out():
    assert sum(map(runs_here, commands())) >= 8
    assert [command for command in commands()
            if not runs_here(command) and not command.startswith(tuple(ELSEWHERE))] == []


def run_in(folder: str, line: str) -> object:
    """Exit status of a command, run in this process with its own name, arguments and folder."""
    os.chdir(folder)
    sys.argv = shlex.split(line.removeprefix("python "))
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
    for name in ("test", "val"):
        shutil.copytree(scene_shards(8), folder / "data" / name)
    shutil.copy(ROOT / "examples/my.yaml", folder)
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
    # on the model and the shards that those have made
    (laptop,) = [command for command in commands() if command.startswith(LAPTOP)]
    assert run_ranks(2, run_in, str(folder), laptop.partition(" --num_gpus 2")[2].strip(), timeout=400) == [0, 0]
    assert len(training_lines(folder / "runs/mine")) == 2 and (folder / "runs/mine/hf/config.json").exists()
