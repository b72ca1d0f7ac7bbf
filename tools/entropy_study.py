"""Find out which entropy control helps: train every method at every noise level and seed, and set it beside the claims.

    python tools/entropy_study.py --quick
    python tools/entropy_study.py --out runs/entropy_study --report runs/entropy_study/report
    python tools/entropy_study.py --out runs/entropy_study --report-only

It can be stopped at any time: called again, it goes on with the runs that have no result yet. Runs whose configuration
has changed since are refused, or replaced with --redo. It ends with exit code 1 when trainings failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from megavg.protocols.config import ConfigError
from tools.study_plan import Study, Task, check_noises, plan, read_study, save_study

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "entropy_study.yaml"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare methods of entropy control on a small scale; resumable run by run.",
        epilog="Further arguments override options of the study's file, such as seeds=[0] noises=[0,0.5] "
               "only=[grpo,vepo] run.trainer.num_steps=20")
    parser.add_argument("--config", default=str(CONFIG), help="the study (default examples/entropy_study.yaml)")
    parser.add_argument("--out", help="folder for everything (default runs/entropy_study, with --quick "
                                      "runs/entropy_study_quick)")
    parser.add_argument("--quick", action="store_true", help="the file's small form")
    parser.add_argument("--workers", type=int, help="trainings at a time (default: one per GPU, or per core)")
    parser.add_argument("--report", metavar="DIR", help="folder for the report (default OUT/report)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is there")
    parser.add_argument("--redo", action="store_true", help="replace results of another configuration")
    parser.add_argument("--plan", action="store_true", help="only say which trainings there are")
    parser.add_argument("overrides", nargs="*", metavar="option=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status: 0, 1 when trainings failed, 2 when it cannot be run as asked."""
    arguments = parse_arguments(argv)
    out = Path(arguments.out or f"runs/entropy_study{'_quick' if arguments.quick else ''}").resolve()
    try:
        study = _study(arguments, out)
        tasks = plan(study)
        if arguments.plan:
            print("\n".join(task.name for task in tasks))
            return 0
        if arguments.report_only:
            failed = {}
        else:
            with _alone_in(out):
                failed = train(study, tasks, out, arguments)
    except (ConfigError, _Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from tools.study_report import write_report

    folder = Path(arguments.report or out / "report")
    results = write_report(study, out, folder, _facts(out))
    changed = f", {len(results.changed)} are of another configuration" if results.changed else ""
    print(f"[study] {len(results.done)} runs are done, {len(results.missing)} are missing{changed}; report: "
          f"{folder}/index.md")
    for name, error in failed.items():
        print(f"[study] {name} failed: {error.strip().splitlines()[-1]}", file=sys.stderr)
    return 1 if failed else 0


class _Refused(Exception):
    """The study cannot be run as asked."""


def _study(arguments: argparse.Namespace, out: Path) -> Study:
    """The study of the arguments; a report alone is of the study that ``out`` was made by."""
    if arguments.report_only:
        if arguments.quick or arguments.overrides:
            raise _Refused("--report-only reports the study that the folder was made by; leave out --quick and options")
        if not (out / "study.yaml").is_file():
            raise _Refused(f"there is no study in {out}; name its folder with --out")
        return read_study(out / "study.yaml")
    check_noises(read_study(arguments.config))
    return read_study(arguments.config, arguments.quick, arguments.overrides)


@contextlib.contextmanager
def _alone_in(out: Path):
    """Keep a second process from working on the same study; the lock goes with the process, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _Refused(f"another process works on the study in {out}; wait for it, or name another folder with "
                           "--out") from error
        yield


def train(study: Study, tasks: list[Task], out: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Carry out what has no result yet; returns the errors of failed trainings by name."""
    from tools.study_runs import ChangedConfiguration, Runner, num_workers, say, unfinished

    if arguments.workers is not None and arguments.workers < 1:
        raise _Refused(f"--workers {arguments.workers} must be at least 1")
    try:
        todo = unfinished(tasks, out, arguments.redo)
    except ChangedConfiguration as error:
        raise _Refused(str(error)) from error
    save_study(study, out / "study.yaml")
    say(f"{len(tasks) - len(todo)} of {len(tasks)} trainings are done, {len(todo)} are left; folder {out}")
    if not todo:
        return {}
    make_data(study, out / "data", arguments.redo)
    workers = num_workers(arguments.workers)
    _keep_facts(out, arguments, workers)
    return Runner(out, todo, workers).run()


def make_data(study: Study, folder: Path, redo: bool) -> None:
    """Draw the scenes, once for a study."""
    import dataclasses

    from megavg.data.scenes import scenes
    from megavg.data.writer import write_shards
    from tools.study_runs import say, write_json

    spec, done = dataclasses.asdict(study.data), folder / "done.json"
    if done.is_file():
        if json.loads(done.read_text()) == spec:
            return
        if not redo:
            raise _Refused(f"{folder} holds other scenes; name another folder with --out, or give --redo")
        done.unlink()
    say(f"drawing {study.data.train} scenes")
    for offset, name in enumerate(("train", "held_out", "validation")):
        drawn = scenes(spec[name], study.data.seed + offset, **study.data.scenes)
        write_shards(drawn, str(folder / name), "scenes", 256)
    write_json(done, spec)


def _keep_facts(out: Path, arguments: argparse.Namespace, workers: int) -> None:
    """What the report says of how the study was made."""
    from tools.study_runs import visible_gpus, write_json

    words = ["python", "tools/entropy_study.py", *(["--quick"] if arguments.quick else []),
             *(["--config", os.path.relpath(arguments.config, ROOT)] if arguments.config != str(CONFIG) else []),
             *arguments.overrides]
    write_json(out / "facts.json", {"command": shlex.join(words), "workers": workers,
                                    "device": "GPU" if visible_gpus() else "CPU"})


def _facts(out: Path) -> dict:
    path = out / "facts.json"
    if path.is_file():
        return json.loads(path.read_text())
    return {"command": "python tools/entropy_study.py", "workers": 0, "device": "CPU"}


if __name__ == "__main__":
    sys.exit(main())
