#!/usr/bin/env python
"""Measure how fast answers are read and judged: typical ones per second, and hostile ones at twice the length.

    python tools/bench_answers.py
    python tools/bench_answers.py --length 1000000

The hostile ones go through all that reads model text: boxes, points, the class, "None", and the strict form of every
task; the slowest of them counts. Reading is linear in the length of an answer, so twice the length takes about twice
the time; a ratio above 3 is marked. Times are those of this process on the CPU, the least of the repeats. Take them on
an idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Each is repeated to the length that is asked for; the second part stands once, in front.
HOSTILE = {
    "open brackets": ("[", ""), "open braces": ("{", ""), "nested objects": ('{"bbox_2d":', ""),
    "empty lists": ("[]", ""), "lists under another key": ('"a": [1],', ""), "escapes": ("\\\"", '{"label": "'),
    "digits": ("9", "[0, 0, 5, "), "blanks": (" ", "["), "parentheses": ("(", ""), "half corners": ("(1,2),", ""),
    "blanks after a corner": (" ", "(1,2)"), "box tokens": ("<|box_start|>", ""), "answers": ("<answer>", ""),
    "labels": ('{"label": "x", ', ""), "braces with a label": ("{}", '{"label": "x"}'),
    "brackets with a label": ("{[", '{"label": "x"}'), "references": ("<|object_ref_start|>x", ""),
}


def main() -> int:
    """Print two tables; 1 where a text takes more than three times as long at twice the length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=200_000, help="characters of the shorter hostile answers")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--answers", type=int, default=2000, help="typical answers to judge with each reward")
    options = parser.parse_args()
    judge_typical(options.answers, options.repeats)
    return read_hostile(options.length, options.repeats)


def least(work, repeats: int) -> float:
    """Seconds of processor time of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def judge_typical(count: int, repeats: int) -> None:
    """Answers per second of each reward, on the true answer of a sample of its own task."""
    from megavg.ops.answer_text import format_answer
    from megavg.protocols.plugin import names_in
    from megavg.protocols.sample import RESIZED_PX, Completion, Frame, Sample
    from megavg.rewards.base import load_rewards, score

    tasks = {"point_in_box": "point", "detection": "detection", "classification": "classification"}
    frame, boxes = Frame(RESIZED_PX, 640, 480, 644, 476), ((100, 50, 300, 150), (400, 200, 600, 400))
    print(f"{'reward':<16}{'task':<16}{'answers per second':>18}")
    for name in names_in("megavg.rewards"):
        task, terms = tasks.get(name, "rec"), load_rewards([{"name": name}])
        sample = Sample("k", "", None, 640, 480, "it", () if task == "classification" else boxes, {}, task,
                        {"detection": ("king", "queen"), "classification": ("king",)}.get(task, ()))
        completion = Completion(format_answer(sample, frame, "json_resized_px"), "json_resized_px", frame)
        seconds = least(lambda: [score(completion, sample, terms) for _ in range(count)], repeats)
        print(f"{name:<16}{task:<16}{count / max(seconds, 1e-9):>18,.0f}")


def all_readers() -> list:
    """Everything that reads a model's text, as functions of the text; the two JSON formats are read alike."""
    from megavg.ops.answer_text import class_name, says_none
    from megavg.ops.box_formats import BOX_FORMATS
    from megavg.ops.box_scan import read_boxes
    from megavg.ops.point_scan import read_points
    from megavg.ops.strict_text import strict_format
    from megavg.protocols.sample import TASKS

    readers = [class_name, says_none]
    for box_format in BOX_FORMATS[1:]:
        readers += [partial(read, box_format=box_format) for read in (read_boxes, read_points)]
        readers += [partial(strict_format, box_format=box_format, task=task) for task in TASKS]
    return readers


def read_hostile(length: int, repeats: int) -> int:
    """Milliseconds at one and at two lengths, of the slowest reader."""
    readers = all_readers()
    print(f"\n{'hostile answer':<26}{'ms at ' + format(length, ','):>16}{'at twice that':>16}{'ratio':>8}")
    failed = 0
    for name, (piece, front) in HOSTILE.items():
        times = []
        for size in (length, 2 * length):
            text = front + piece * (size // len(piece))
            times.append(max(least(lambda: read(text), repeats) for read in readers))
        ratio = times[1] / max(times[0], 1e-4)  # what takes less than that is all overhead
        failed |= ratio > 3
        print(f"{name:<26}{times[0] * 1e3:>16.1f}{times[1] * 1e3:>16.1f}{ratio:>8.2f}{'  not linear' * (ratio > 3)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
