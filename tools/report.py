"""Make one HTML page of one or more runs: curves, evaluations, answers with their boxes, reasons, times, options.

    python tools/report.py runs/demo/rl
    python tools/report.py runs/grpo runs/ecvgpo --out compare.html --title "ECVGPO beside GRPO"

A run may still be going, or have been killed. The page loads nothing and can be sent as it is.
Exit status: 0 the page is written, 2 a folder holds no run or the page cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="trainer.output_dir of a run; several are compared")
    parser.add_argument("--out", metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument("--title", help="default: the names of the runs")
    parser.add_argument("--smooth", type=int, default=0, metavar="N",
                        help="curves show the mean of the last N values, 1 draws them as they are (default: a "
                             "twenty-fifth of the shortest run)")
    parser.add_argument("--max-answers", type=int, default=6, metavar="N",
                        help="answers of each kind for each evaluation set (default 6; 0 shows none)")
    return parser


def make(args: argparse.Namespace) -> Path:
    """Write the page beside and rename it; returns its path."""
    from tools.report_page import page
    from tools.report_run import read_runs

    runs = read_runs(args.runs)
    out = Path(args.out) if args.out else runs[0].folder / "report.html"
    if out.is_dir():
        raise ValueError(f"--out: {out} is a folder; give the name of a file, such as {out / 'report.html'}")
    content = page(runs, args.title or _title(runs), args.smooth, args.max_answers)
    partial = out.with_name(out.name + ".tmp")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, out)
    for run in runs:
        for note in run.notes:
            print(f"report: {run.name}: {note}", file=sys.stderr)
    return out


def _title(runs: list) -> str:
    return " and ".join(run.name for run in runs) if len(runs) > 1 else "/".join(runs[0].folder.parts[-2:])


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.smooth, args.max_answers) < 0:
        parser.error("--smooth and --max-answers are at least 0")
    try:
        out = make(args)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(f"{out}  {out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
