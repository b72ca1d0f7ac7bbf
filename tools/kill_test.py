"""Kill a small training again and again, start it again each time, and see that it ends as if nothing had happened.

    python tools/kill_test.py
    python tools/kill_test.py --kills 20 --ranks 2 --background --json kills.json

A run under a closed loop (ECVGPO, two-stage entropy, resampling) with evaluations and checkpoints is trained once in
peace. Then all ranks of the same run get SIGKILL at random moments, in every phase, and the same command starts it
again, until it ends. Metrics (but for times), answers of evaluations, exported weights and the last checkpoint's
tensors have to be bit for bit those of the first run, and at no moment may a whole checkpoint be lacking once there
was one.

Exit status: 0 all equal, 1 something differs, 2 wrong arguments or a run that cannot train.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Callable

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if TYPE_CHECKING:
    from tools.killed_runs import End, KilledRun, Moment, Timeline

AIMED = 0.5
"""Share of the kills that are aimed at a phase; the others come at any time of what is left of the run."""
TARGETS = {"start-up": 1, "rollout": 1, "scoring": 1, "update": 1, "save": 3, "writing": 3, "evaluation": 2,
           "export": 1}
"""How often each phase is aimed at; "writing" is a checkpoint that lies there half written."""

LATE_KILLS = 2
"""A run that has taken all its steps is killed only so often: there is little left of it to be lost."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, metavar="N",
                        help="how often all ranks are killed (default 50)")
    parser.add_argument("--kills-per-run", type=int, default=10, metavar="N",
                        help="a run that was killed so often is left alone, and a new one begins (default 10)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes of the run (default 4)")
    parser.add_argument("--tp", type=int, default=1, metavar="N",
                        help="parallel.tensor_model_parallel_size (default 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N",
                        help="parallel.pipeline_model_parallel_size (default 1)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="trainer.num_steps (default 6)")
    parser.add_argument("--save-every", type=int, default=1, metavar="N", help="trainer.save_every (default 1)")
    parser.add_argument("--background", action="store_true", help="trainer.save_in_background=true")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses the moments (default 0)")
    parser.add_argument("--out", metavar="FOLDER",
                        help="work here, and keep the model to start from, which another test can use again, and the "
                             "run in peace; default: a scratch folder, kept only where something differs")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    return parser


def choose(chance: random.Random, typical: Timeline, done: float) -> Moment:
    """When the next kill comes, where ``done`` of the training is behind."""
    from tools.killed_runs import Moment

    if chance.random() < AIMED:
        targets = {phase: often for phase, often in TARGETS.items() if done < 1 or phase in ("start-up", "export")}
        phase = chance.choices(list(targets), list(targets.values()))[0]
        count = chance.randint(1, 2) if done < 0.5 and phase not in ("start-up", "export") else 1
        return Moment(phase, count, chance.uniform(0, typical.seconds_of(phase)))
    begin = typical.seconds_of("start-up")
    return Moment(None, 0, chance.uniform(0, begin + (typical.total - begin) * (1 - done)))


def torment(run: KilledRun, typical: Timeline, kills: int, chance: random.Random,
            tell: Callable[[End], None]) -> list[End]:
    """Start ``run`` until it ends, with at most ``kills`` kills on the way; returns how these starts ended."""
    ends, late = [], 0
    while len(ends) < kills and late < LATE_KILLS:
        late += run.share_done() == 1
        end = run.start(choose(chance, typical, run.share_done()))
        if not end.killed:
            return ends
        ends.append(end)
        tell(end)
    if run.start(None).killed:
        raise AssertionError("nobody killed it")
    return ends


def test(args: argparse.Namespace, folder: Path) -> dict:
    """The report as plain JSON."""
    from tools.killed_runs import KilledRun, differences, prepare, run_tree

    started, chance = time.monotonic(), random.Random(args.seed)
    _say("training the model to start from, and the run that nobody kills")
    prepare(folder)
    options = {"ranks": args.ranks, "tp": args.tp, "pp": args.pp, "steps": args.steps, "save_every": args.save_every,
               "background": args.background}
    peace = KilledRun(folder / "peace", args.ranks, run_tree(folder, folder / "peace", **options))
    peace.start(None)
    typical = peace.timeline
    _say(f"it took {typical.total:.1f} s, {typical.seconds_of('start-up'):.1f} s of them to start")
    ends, wrong, runs = [], [], 0
    while len(ends) < args.kills and runs < 2 * args.kills:
        runs += 1
        name = f"killed-{runs:03d}"
        run = KilledRun(folder / name, args.ranks, run_tree(folder, folder / name, **options))
        before = len(ends)

        def tell(end):
            _say(f"{name}: kill {before + len(run.ends)}/{args.kills} in {end.phase}, after step {end.step}"
                 + (", a checkpoint half written" if end.half_written else "") + f"; whole: {end.newest or 'none'}")

        ends += torment(run, typical, min(args.kills_per_run, args.kills - len(ends)), chance, tell)
        found = [f"{name}: {line}" for line in run.problems + differences(peace.folder, run.folder)]
        _say(f"{name}: {len(ends) - before} kills, {found[0] if found else 'ended bit for bit as the run in peace'}")
        wrong += found
        if not found:
            shutil.rmtree(run.folder)
    return {"ok": not wrong and len(ends) == args.kills, "kills": len(ends), "runs": runs,
            "layout": f"TP{args.tp} x PP{args.pp} x DP{args.ranks // (args.tp * args.pp)}",
            "background": args.background, "phases": dict(Counter(end.phase for end in ends).most_common()),
            "half_written": sum(end.half_written for end in ends), "seconds_in_peace": round(typical.total, 1),
            "seconds": round(time.monotonic() - started, 1), "wrong": wrong}


def show(report: dict) -> None:
    """Print the report for a person."""
    print(f"{report['kills']} kills of {report['layout']} in {report['runs']} runs, checkpoints written "
          f"{'in the background' if report['background'] else 'in the foreground'}; {report['seconds']:.0f} s in all")
    print("killed in: " + ", ".join(f"{phase} {count}" for phase, count in report["phases"].items())
          + f"; a checkpoint lay half written: {report['half_written']}")
    for line in report["wrong"]:
        print(f"WRONG: {line}")
    if report["ok"]:
        print("every run ended with the metrics, evaluations, weights and checkpoint of the run in peace, bit for bit; "
              "a whole checkpoint was always there")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.kills, args.kills_per_run, args.ranks, args.tp, args.pp, args.steps, args.save_every) < 1:
        parser.error("every number but --seed is at least 1")
    if args.ranks % (args.tp * args.pp):
        parser.error(f"--ranks {args.ranks} is not divisible by --tp {args.tp} * --pp {args.pp}")
    folder = Path(args.out or tempfile.mkdtemp(prefix="kill_test-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "peace").exists():
            parser.error(f"--out {folder} already holds a test; remove its runs or choose another folder")
        report = test(args, folder)
        if args.json:
            Path(args.json + ".tmp").write_text(json.dumps(report, indent=1) + "\n")
            os.replace(args.json + ".tmp", args.json)
    except (OSError, RuntimeError) as error:
        print(f"kill_test: error: {error}", file=sys.stderr)
        return 2
    show(report)
    if report["ok"] and not args.out:
        shutil.rmtree(folder)
    elif not report["ok"]:
        print(f"the runs are kept in {folder}")
    return 0 if report["ok"] else 1


def _say(text: str) -> None:
    print(f"kill_test: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
