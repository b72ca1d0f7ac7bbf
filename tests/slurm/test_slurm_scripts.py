"""The job scripts without a Slurm: what they say they would run, what they refuse, and slurm/README.md's commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
PAGE = (SCRIPTS / "README.md").read_text()
SUBMITTED = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
             if re.search(r"\b(sbatch|bash) .*\.sbatch", line)]


def run(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGAVG_"))}
    return subprocess.run(["bash", str(SCRIPTS / script), *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**kept, "MEGAVG_VENV": sys.prefix, **environment}, timeout=60)


def last_line(script: str, *arguments: str, **options) -> str:
    done = run(script, "--dry-run", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].strip()


def test_a_dry_run_says_what_every_rank_would_run():
    line = last_line("train.sbatch", "examples/demo.yaml", "trainer.num_steps=7", "data.prompt=Where is {expression}?")
    words = shlex.split(line)
    assert words[:1] + words[-8:] == [
        "srun", str(SCRIPTS / "rank.sh"), "python", str(ROOT / "megavg/train.py"), "--config", "examples/demo.yaml",
        "trainer.resume=auto", "trainer.num_steps=7", "data.prompt=Where is {expression}?"]
    assert "--kill-on-bad-exit=1" in words
    shown = run("train.sbatch", "--dry-run", "examples/demo.yaml").stdout
    assert "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8" in shown and "--signal=USR1@120 --requeue" in shown


def test_a_dry_run_of_the_other_scripts(tmp_path):
    assert last_line("evaluate.sbatch", "examples/evaluate_refcoco.yaml", "evaluation.limit=3").endswith(
        "megavg/evaluate.py --config examples/evaluate_refcoco.yaml evaluation.limit=3")
    assert last_line("convert.sbatch", "runs/a", "out", cwd=tmp_path, SLURM_CPUS_PER_TASK="4").endswith(
        "tools/convert_checkpoint.py runs/a out --workers 4")
    assert last_line("convert.sbatch", "runs/a", "out", "--workers", "2").endswith("runs/a out --workers 2")
    line = last_line("make_shards.sbatch", "--format", "scenes", "--count", "4", "--out", "x", MEGAVG_MPI="pmi2")
    assert line.startswith("srun --mpi=pmi2 ") and line.endswith("make_shards.py --format scenes --count 4 --out x")


def test_a_run_that_is_to_be_replaced_is_not_resumed():
    line = last_line("train.sbatch", "examples/demo.yaml", "trainer.overwrite=true", "trainer.num_steps=2")
    assert line.endswith("--config examples/demo.yaml trainer.overwrite=true trainer.num_steps=2")


@pytest.mark.parametrize("script, config", [("train", "demo"), ("evaluate", "evaluate_refcoco")])
def test_without_an_environment_it_says_how_to_get_one(tmp_path, script, config):
    for name in ("bash", "dirname", "realpath", "sed", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(f"{script}.sbatch", "--dry-run", f"examples/{config}.yaml", PATH=str(tmp_path), MEGAVG_VENV="/nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no python; make setup makes /nowhere, or set MEGAVG_VENV or")


def test_the_folder_of_a_run_is_no_pattern(tmp_path):
    folder = tmp_path / "a [1] *" / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("12345")
    (tmp_path / "a 1 x").mkdir()
    script = (f'MEGAVG_HOME={ROOT}; . "$MEGAVG_HOME/slurm/job.sh"; '
              f'compgen -G "$(escaped "{tmp_path}/a [1] *")/checkpoints/step-*/manifest.json"')
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "SLURM_JOB_ID": ""})
    assert found.stdout.splitlines() == [str(folder / "manifest.json")], found.stderr


@pytest.mark.parametrize("script, arguments", [
    ("train.sbatch", []), ("evaluate.sbatch", []), ("convert.sbatch", ["a"]), ("make_shards.sbatch", [])])
def test_a_dry_run_without_arguments_says_what_is_missing(script, arguments):
    done = run(script, "--dry-run", *arguments)
    assert done.returncode == 2 and f"slurm/{script}" in done.stdout and done.stderr == ""


def test_a_seed_of_an_array_has_its_own_folder():
    line = last_line("train.sbatch", "examples/demo.yaml", "trainer.output_dir=runs/mine", SLURM_ARRAY_TASK_ID="3")
    assert line.endswith("trainer.output_dir=runs/mine trainer.seed=3 trainer.output_dir=runs/mine/seed-3")


@pytest.mark.parametrize("script, arguments, words", [
    ("train.sbatch", ["examples/demo.yaml", "trainer.num_stps=3"], "did you mean 'num_steps'"),
    ("train.sbatch", ["gone.yaml"], "configuration file gone.yaml does not exist"),
    ("evaluate.sbatch", ["examples/evaluate_refcoco.yaml", "evaluation.limt=3"], "did you mean 'limit'"),
])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_wrong_configuration_is_one_line_before_any_rank_starts(script, arguments, words, dry):
    done = run(script, *dry, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script, arguments", [
    ("train.sbatch", ["examples/demo.yaml"]), ("evaluate.sbatch", ["examples/evaluate_refcoco.yaml"]),
    ("convert.sbatch", ["a", "b"]), ("make_shards.sbatch", ["--format", "scenes"])])
def test_outside_of_slurm_nothing_is_started(script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 2 and "submit it with sbatch, or add --dry-run" in done.stderr
    asked = run(script)
    assert asked.returncode == 2 and f"slurm/{script}" in asked.stdout and "--dry-run" in asked.stdout


# what each start ends with, and whether it has kept something new: a hang, or being asked to leave
@pytest.mark.parametrize("starts, ends_at", [
    ("hang hang hang", 2), ("hang+ hang hang hang", 3), ("hang hang+ hang hang hang", 4),
    ("hang hang leave+ hang hang hang", 5), ("hang hang leave hang", 3), ("hang+ hang+ hang+ hang+ hang+", None),
])
def test_only_starts_in_a_row_that_keep_nothing_new_are_counted(tmp_path, starts, ends_at):
    """job.sh's own counting, without a Slurm that starts the job again."""
    script = [f'MEGAVG_HOME={ROOT}; . "$MEGAVG_HOME/slurm/job.sh"', 'start_again() { echo "again: $1"; }']
    for number, start in enumerate(starts.split()):
        script += ['before=$(listing "kept-*")', *([f"touch kept-{number}"] if start.endswith("+") else []),
                   *(['(start_after_failure 76 hung "kept-*" "$before") || exit']
                     if start.startswith("hang") else ['echo "again: left"'])]
    done = subprocess.run(["bash", "-uc", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "SLURM_JOB_ID": "7", "MAX_FUTILE_STARTS": "3"})
    assert done.stderr == "" and done.stdout.count("again: ") == (len(starts.split()) if ends_at is None else ends_at)
    assert (done.returncode == 76) == (ends_at is not None) == ("3 times in a row" in done.stdout), done.stdout


def test_a_script_far_from_the_repository_says_what_to_do(tmp_path):
    copy = tmp_path / "slurm_script"  # as slurmd runs it
    copy.write_text((SCRIPTS / "train.sbatch").read_text())
    done = run(str(copy), "--dry-run", str(ROOT / "examples/demo.yaml"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: submit from megavg's folder, or export MEGAVG_HOME")
    for name in ("MEGAVG_HOME", "SLURM_SUBMIT_DIR"):
        assert run(str(copy), "--dry-run", "examples/demo.yaml", **{name: str(ROOT)}).returncode == 0


def test_the_page_has_commands():
    shown = set(re.findall(r"slurm/(\w+\.sbatch)", "".join(SUBMITTED)))
    assert shown == {path.name for path in SCRIPTS.glob("*.sbatch")}


@pytest.mark.parametrize("line", SUBMITTED)
def test_commands_of_the_page(line):
    """Each with the options that sbatch would take left out, as a dry run."""
    words = shlex.split(line.split(" #")[0])
    place = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    arguments = words[place + 1:]
    done = run(Path(words[place]).name, "--dry-run", *(arguments[1:] if arguments[0] == "--dry-run" else arguments))
    assert done.returncode == 0, done.stderr


def test_files_that_the_page_names_exist():
    named = re.findall(r"`((?:slurm|megavg|tools|examples|tests|docs)/[\w./]+)`", PAGE)
    assert named and not [path for path in named if not (ROOT / path).exists()]
