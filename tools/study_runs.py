"""Carry out a study's trainings on worker processes, each of which is a world of one rank and goes from run to run."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tools.local_ranks import free_port
from tools.study_plan import Task

TASKS_PER_WORKER = 20
"""A worker is replaced after so many trainings: what engines leave behind in a process is given back."""
RESULT, FAILURE = "result.json", "failure.json"


class ChangedConfiguration(Exception):
    """A folder holds the result of another configuration."""


def read_result(folder: Path) -> dict | None:
    """The result of a finished training; None where there is none."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside and rename, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def unfinished(tasks: list[Task], out: Path, redo: bool) -> list[Task]:
    """The tasks without a result of their configuration.

    Raises:
        ChangedConfiguration: a result is of another configuration and ``redo`` is False.
    """
    todo, changed = [], []
    for task in tasks:
        result = read_result(out / task.name)
        if result is None:
            todo.append(task)
        elif result["key"] != task.key:
            changed.append(task)
    if changed and not redo:
        raise ChangedConfiguration(
            f"{len(changed)} finished trainings in {out}, such as {changed[0].name}, are of another configuration; "
            "name another folder with --out, or give --redo to replace them")
    return [task for task in tasks if task in todo or task in changed]


def num_workers(wanted: int | None) -> int:
    """One worker per GPU, or per core where there is no GPU; ``wanted`` sets another number on a CPU."""
    gpus = visible_gpus()
    return min(wanted or len(gpus), len(gpus)) if gpus else wanted or len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


@dataclass
class Worker:
    """A process, the way to talk to it, and what it does now."""

    process: multiprocessing.Process
    pipe: Connection
    gpu: str | None
    task: Task | None = None
    done: int = 0


class Runner:
    """Goes through tasks on several workers.

    Args:
        out: the study's folder.
        tasks: what is to be done; the earlier ones go first as soon as what they need is there.
        workers: how many at a time.
    """

    def __init__(self, out: Path, tasks: list[Task], workers: int):
        self.out, self.waiting, self.total = out, list(tasks), len(tasks)
        self.gpus = visible_gpus()
        self.num_workers = min(workers, len(tasks))
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {"warmup": [], "run": []}
        self.workers: list[Worker] = []

    def run(self) -> dict[str, str]:
        """Do everything that can be done; returns the failed tasks' names with their errors."""
        try:
            self.workers = [self._start(self.gpus[i] if self.gpus else None) for i in range(self.num_workers)]
            while True:
                self._hand_out()
                busy = {worker.pipe: worker for worker in self.workers if worker.task}
                if not busy:
                    break
                for pipe in wait(list(busy)):
                    self._receive(busy[pipe])
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
        return self.failed

    def _start(self, gpu: str | None) -> Worker:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_worker_main, args=(theirs, str(self.out), gpu), daemon=True)
        with _one_thread():
            process.start()
        theirs.close()
        return Worker(process, ours, gpu)

    def _hand_out(self) -> None:
        for i, worker in enumerate(self.workers):
            task = self._next() if worker.task is None else None
            if task is None:
                continue
            if worker.done >= TASKS_PER_WORKER or not worker.process.is_alive():
                worker.process.kill()
                worker = self.workers[i] = self._start(worker.gpu)
            (self.out / task.name / FAILURE).unlink(missing_ok=True)
            (self.out / task.name / RESULT).unlink(missing_ok=True)
            worker.task = task
            worker.pipe.send(task)

    def _next(self) -> Task | None:
        """The first waiting task whose needs are met; those whose needs have failed are given up."""
        for task in list(self.waiting):
            if task.needs in self.failed:
                self.waiting.remove(task)
                self._fail(task, f"{task.needs}, which it starts from, failed")
        running = {worker.task.name for worker in self.workers if worker.task}
        pending = running | {task.name for task in self.waiting}
        for task in self.waiting:
            if task.needs not in pending:
                self.waiting.remove(task)
                return task
        return None

    def _receive(self, worker: Worker) -> None:
        task, worker.task = worker.task, None
        worker.done += 1
        try:
            result, error = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            result, error = None, f"its process ended with exit code {worker.process.exitcode}"
        if error:
            self._fail(task, error)
            return
        self.seconds[task.kind].append(result["seconds"])
        say(f"{self._count()} {task.name}  {result['seconds']:.0f} s  {_figures(result)}{self._time_left()}")

    def _fail(self, task: Task, error: str) -> None:
        self.failed[task.name] = error
        write_json(self.out / task.name / FAILURE, {"key": task.key, "error": error})
        say(f"{self._count()} {task.name}  FAILED: {error.strip().splitlines()[-1]}")

    def _count(self) -> str:
        running = sum(worker.task is not None for worker in self.workers)
        return f"[{self.total - len(self.waiting) - running}/{self.total}]"

    def _time_left(self) -> str:
        """From the mean of what has run; nothing before there is a run of every kind that is left."""
        left = self.waiting + [worker.task for worker in self.workers if worker.task]
        if not left or any(not self.seconds[task.kind] for task in left):
            return ""
        means = {kind: sum(values) / len(values) for kind, values in self.seconds.items() if values}
        seconds = sum(means[task.kind] for task in self.waiting)
        seconds += sum(means[worker.task.kind] / 2 for worker in self.workers if worker.task)
        return f"  about {max(1, round(seconds / self.num_workers / 60))} min left"


def say(text: str) -> None:
    """One line of progress."""
    print(f"[study] {text}", flush=True)


def _figures(result: dict) -> str:
    figures = result["final"]
    text = f"Acc@0.5 {figures['acc_at_50']:.3f}" if "acc_at_50" in figures else ""
    return text + (f"  entropy {figures['entropy']:.3f}" if "entropy" in figures else "")


@contextlib.contextmanager
def _one_thread():
    """A started process reads the number of its threads as it imports torch."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def _end_with_parent() -> None:
    """Leave as soon as the process that gives the tasks is gone, however it went: another study may take the folder."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker_main(pipe: Connection, out: str, gpu: str | None) -> None:
    _end_with_parent()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(free_port()))
    os.environ.update({"DS_ACCELERATOR": "cpu"} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # whoever gave the tasks is gone
            os._exit(0)
        try:
            answer = (_carry_out(task, Path(out)), None)
        except Exception:
            answer = (None, traceback.format_exc())
        gc.collect()
        pipe.send(answer)


def _carry_out(task: Task, out: Path) -> dict:
    """Do one training, with its console in log.txt, and leave its result."""
    folder, started = out / task.name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _console_to(folder / "log.txt"):
        from megavg.trainer.config import resolve
        from megavg.trainer.trainer import Trainer

        if task.kind == "warmup":
            _make_checkpoint(task, folder.parent / "checkpoint")
        Trainer(resolve(task.tree_in(out))).run()
    result = {"name": task.name, "key": task.key, "method": task.method, "noise": task.noise, "seed": task.seed,
              "seconds": time.monotonic() - started, **collect(folder),
              # of the whole worker so far: what grows from run to run shows here
              "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if task.kind == "warmup":
        result["num_parameters"] = _num_parameters(folder / "hf")
    for name in ("evaluation", "pictures", "checkpoints", "heat_maps"):  # the figures are in the result
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / RESULT, result)
    return result


@contextlib.contextmanager
def _console_to(path: Path):
    """Send what this process prints to a file, also what libraries print by themselves."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(path, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=log)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), kept):
                os.dup2(copy, descriptor)
                os.close(copy)


def _make_checkpoint(task: Task, folder: Path) -> None:
    from transformers.utils import logging

    from megavg.models.tiny import TinySpec, make_tiny_checkpoint

    logging.disable_progress_bar()
    make_tiny_checkpoint(folder, TinySpec(**task.checkpoint), overwrite=True)


def _num_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def collect(folder: Path) -> dict:
    """Curves, evaluations and final figures of a run, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    names = dict.fromkeys(name for line in training for name, value in line.items()
                          if isinstance(value, (int, float)) and not name.startswith(("time/", "memory/")))
    curves = {name: [line.get(name) for line in training] for name in names}
    evaluations: dict[str, list] = {}
    for line in lines:
        figures = {name.split("/")[2]: value for name, value in line.items() if name.startswith("eval/")}
        for name, value in ({"step": line["step"], **figures} if figures else {}).items():
            evaluations.setdefault(name, []).append(value)
    return {"curves": curves, "evaluations": evaluations, "final": final_figures(curves, evaluations)}


def final_figures(curves: dict[str, list], evaluations: dict[str, list]) -> dict[str, float]:
    """What the report compares. A tenth of the steps is averaged wherever a figure is of the training.

    acc_at_50, mean_iou, parse_rate: of the last evaluation. entropy, reward: of the last tenth of the steps;
    entropy_rise: entropy of the tenth that ends at 80 % of the steps over that of the first; entropy_fall: that of the
    last over that at 80 %.
    """
    final = {name: evaluations[name][-1] for name in ("acc_at_50", "mean_iou", "parse_rate") if name in evaluations}
    entropy = curves["entropy/mean"]
    count = len(entropy)
    tenth, switch = max(1, round(count / 10)), max(1, round(0.8 * count))
    start, end = _mean(entropy[:tenth]), _mean(entropy[-tenth:])
    before = _mean(entropy[max(0, switch - tenth):switch])
    final |= {"entropy": end, "entropy_rise": before / start, "entropy_fall": end / before}
    if "reward/mean" in curves:
        final["reward"] = _mean(curves["reward/mean"][-tenth:])
    gain = [after - clean for clean, after in zip(curves.get("saei/entropy_clean", []),
                                                  curves.get("saei/entropy_attacked", []))]
    if gain:
        final["saei_gain"] = _mean(gain)
    return final


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
