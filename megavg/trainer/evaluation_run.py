"""One evaluation of a checkpoint, on every process of it: answer what is missing, score everything, report.

Answers are kept as they come; figures are made at the end from the answers on the disk and the records of the shards,
so a killed run goes on where it was, also in another layout, and ends with the same figures.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Iterator

import torch.distributed as dist

from megavg.data.prompts import Prompts
from megavg.data.shards import expand_shards
from megavg.evaluation.answer_log import pack, unpack
from megavg.evaluation.figures import figures, summary
from megavg.evaluation.fingerprint import describe_checkpoint, describe_shards, open_set
from megavg.evaluation.reader import SetReader, check_index, indexed_count, pictures_of
from megavg.evaluation.report import versions, write_results, write_set
from megavg.evaluation.rows import GROUP_FIELDS, answer_row
from megavg.evaluation.tables import benchmark_of, benchmark_tables
from megavg.parallel.mcore import make_context, start_processes
from megavg.parallel.watchdog import Watchdog
from megavg.protocols.sample import Sample
from megavg.trainer.answering import LoadedModel
from megavg.trainer.bad_data import told_to_all
from megavg.trainer.evaluate_config import EvaluateConfig
from megavg.trainer.evaluator import check_complete, greedy_answers, usable_samples
from megavg.trainer.frame_check import FrameReport
from megavg.trainer.frame_look import look_at
from megavg.trainer.kept_answers import KeptAnswers, disk_told
from megavg.trainer.prompt_log import PromptLog

_SECONDS_BETWEEN_LINES = 15
_AGAIN = "make room, and give the same command again: what is answered stays"
_LOOKS = 64  # answers whose frame of coordinates is looked at


class EvaluationRun:
    """Evaluate every set of a configuration; ``run`` is called by all processes.

    The process with rank 0 decides what is there, scores and writes; of each data-parallel rank one process keeps
    the answers. The output folder is on a file system that all machines share.
    """

    def __init__(self, config: EvaluateConfig):
        self.config, self.settings, parallel = config, config.evaluation, config.parallel
        device = start_processes(parallel.timeout_minutes)
        self.context = make_context(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, device,
                                    parallel.timeout_minutes)
        self.folder = Path(self.settings.output_dir)
        self.watchdog = Watchdog(self.folder / "hang", parallel.watched_seconds).start()
        self.shards = {name: expand_shards(part.shards) for name, part in self.settings.sets.items()}
        self.model = LoadedModel(config.model, self.context, config.generation.prompts_per_pass,
                                 config.stage_options())
        data = config.data
        self.prompts = Prompts(self.model.model.spec.family, data.prompt, data.prompts, data.prompts_file,
                               data.thinking)
        self.prompt_log = PromptLog(self.prompts, self.model.processor, self._say)
        self.stored: dict[str, dict] = {}
        self._open()

    @property
    def is_first(self) -> bool:
        """True on the one process that scores and reports."""
        return self.context.rank == 0

    def run(self) -> dict[str, dict]:
        """Answer, score and report; returns the results by set, on the first process."""
        with self.watchdog:
            return self._run()

    def _run(self) -> dict[str, dict]:
        self._say(f"{self.model.model.spec.family} from {self.config.model.path}, {self.config.model.dtype}, "
                  f"{self.context.layout}, {self.context.device.type}, greedy")
        results, rows_of_set, text = {}, {}, ""
        for name in self.settings.sets:
            found = self._run_set(name)
            with told_to_all(self.context):
                if self.is_first:
                    results[name], rows_of_set[name] = found
                    with disk_told(self.folder, _AGAIN):
                        text = write_results(self.folder, results, rows_of_set, self._about(results))
        if self.is_first:
            print(f"\n{text}", flush=True)
            self._say(f"results.json, results.md and the answers are in {self.folder}")
        return results

    def _open(self) -> None:
        """Make the folders, and read what is answered already, before anything is generated."""
        with told_to_all(self.context):
            if self.is_first:
                with disk_told(self.folder, "mend it, or choose another evaluation.output_dir"):
                    checkpoint = describe_checkpoint(self.config.model.path)
                    for name in self.settings.sets:
                        check_index(self.shards[name])
                        self.stored[name] = open_set(self.folder / name, self._fingerprint(name, checkpoint),
                                                     self.settings.overwrite)

    def _fingerprint(self, name: str, checkpoint: dict[str, str]) -> dict:
        """All that an answer depends on, but for the layout and the batches, which change rounding alone."""
        model, part = self.config.model, self.settings.sets[name]
        return {"checkpoint": checkpoint, "dtype": model.dtype, "min_pixels": model.min_pixels,
                "max_pixels": model.max_pixels, "box_format": self.model.processor.box_format,
                "prompts": self.prompts.texts, "max_new_tokens": self.config.generation.max_new_tokens,
                "shards": describe_shards(self.shards[name]), "task": part.task}

    def _run_set(self, name: str) -> tuple[dict, list[dict]] | None:
        """Answer one set and score it; the result and the rows on the first process."""
        part, started = self.settings.sets[name], time.monotonic()
        stored = self._on_all(list(self.stored.get(name, ())))
        reader = SetReader(self.shards[name], self.context.dp_rank, self.context.dp_size, self.config.data.on_error,
                           self.config.data.max_skipped, self.settings.limit, part.where, part.task, set(stored))
        with told_to_all(self.context):
            answers = list(self._answer(name, reader))
        self.watchdog.beat(0, f"figures of {name}")
        with told_to_all(self.context):
            samples, skipped = usable_samples(reader, self.context)
        answers = self.context.gather_rows(answers)
        found = None
        with told_to_all(self.context):
            if self.is_first:
                found = self._score(name, reader, samples, skipped, answers)
                found[0].update(answered_before=len(samples) - len(answers), answered_now=len(answers),
                                seconds=round(time.monotonic() - started, 3))
                self._say(f"{name}: {summary(found[0])}")
        return found

    def _answer(self, name: str, reader: SetReader) -> Iterator[dict]:
        """Answer this rank's part of what is missing; each pass is on the disk before the next begins."""
        generation, kept = self.config.generation, KeptAnswers(self.folder / name, self.context)
        progress = _Progress(name, self._say, self.context.dp_size, len(reader.answered),
                             self.settings.limit or indexed_count(reader.shards))
        passes = greedy_answers(iter(reader), self.model, self.prompts.question, generation.max_new_tokens,
                                generation.prompts_per_pass)
        for number, answers in enumerate(passes, 1):
            self.watchdog.beat(number, f"answers of {name}")
            packed = [pack(sample, completion) for sample, completion in answers]
            kept.append(packed)
            self.prompt_log.tell(sample for sample, _ in answers)
            progress.add(len(packed))
            yield from packed
        kept.close()

    def _score(self, name: str, reader: SetReader, samples: list[Sample], skipped: Counter,
               answers: list[dict]) -> tuple[dict, list[dict]]:
        """Score every sample of the set by its answer, in stored order, and write the set's files."""
        if not samples:
            raise ValueError(f"set {name}: {reader.shards} hold no usable sample that fits where={reader.where}; "
                             f"skipped: {dict(skipped)}, left out by where: {reader.num_filtered}")
        self.prompt_log.tell(samples)  # of tasks that the other ranks answered, or an earlier run
        part = self.settings.sets[name]
        known = self.stored[name] | {(answer["shard"], answer["key"]): answer for answer in answers}
        keep = tuple(dict.fromkeys([*GROUP_FIELDS, *part.where, *part.group_by]))
        rows = [answer_row(sample, unpack(known[sample.shard, sample.key]), keep) for sample in samples
                if (sample.shard, sample.key) in known]
        check_complete(name, samples, rows)
        result = figures(rows) | {
            "skipped": sum(skipped.values()), "skipped_reasons": dict(skipped.most_common()),
            "filtered": reader.num_filtered, "indexed": indexed_count(reader.shards)}
        self._check_count(name, result)
        result |= benchmark_tables(rows, benchmark_of(rows, part.benchmark), part.group_by)
        warning = self._frame_warning(samples, known)
        if warning:
            self._say(f"{name}: {warning}")
            result["frame_warning"] = warning
        with disk_told(self.folder / name, _AGAIN):
            result["files"] = write_set(self.folder / name, name, rows, result, self.settings.worst,
                                        lambda names: pictures_of(reader.shards, names))
        return result, rows

    def _check_count(self, name: str, result: dict) -> None:
        """Every record that index.json counts must be a sample of the figures or be left out for a reason."""
        expected, read = result["indexed"], result["num_samples"] + result["skipped"] + result["filtered"]
        if expected is None or self.settings.limit or expected == read:
            return
        if "torn shard" not in result["skipped_reasons"]:
            raise ValueError(f"set {name}: index.json counts {expected} records, {read} were read; did the shards "
                             "change while they were read?")
        self._say(f"{name}: {expected - read} records or more are missing in these figures: a shard is torn")

    def _frame_warning(self, samples: list[Sample], known: dict[tuple[str, str], dict]) -> str:
        """Tells where the answers fit far better in another frame of coordinates than in the one they are read in."""
        asked = [sample for sample in samples if sample.task in ("rec", "point")][:_LOOKS]
        looks = tuple(look_at(unpack(known[sample.shard, sample.key]), sample) for sample in asked)
        report = FrameReport(looks, self.model.processor.box_format, needs_answers=False)
        if report.verdict != "other frame":
            return ""
        return ("the answers fit far better in another frame of coordinates than in the one they are read in; set "
                f"model.box_format, or ask for this frame (data.prompt, data.prompts)\n{report.table()}")

    def _about(self, results: dict[str, dict]) -> dict:
        """What the figures belong to."""
        tasks = {task for result in results.values() for task in result.get("tasks", [result["task"]])}
        asked = {task: text for task, text in self.prompts.texts.items() if task in tasks}
        return {"model": os.path.normpath(self.config.model.path), "family": self.model.model.spec.family,
                "dtype": self.config.model.dtype, "layout": self.context.layout,
                "device": self.context.device.type, "max_new_tokens": self.config.generation.max_new_tokens,
                "box_format": self.model.processor.box_format, "prompts": asked, "versions": versions(),
                "configuration": self.config.tree()}

    def _on_all(self, value):
        """What the first process says, on every process."""
        if self.context.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _say(self, text: str) -> None:
        if self.is_first:
            print(f"[megavg] {text}", flush=True)


class _Progress:
    """Says every now and then how far the answering is, as the first rank can tell from its own part."""

    def __init__(self, name: str, say, num_ranks: int, before: int, expected: int | None):
        self.name, self._say, self.num_ranks, self.before, self.expected = name, say, num_ranks, before, expected
        self._count, self._started = 0, time.monotonic()
        self._last = self._started

    def add(self, count: int) -> None:
        """Count answers of this rank."""
        self._count += count
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last, done = now, self._count * self.num_ranks
        rate, left = done / (now - self._started), ""
        if self.expected:
            left = f" of {self.expected}, {max(self.expected - self.before - done, 0) / rate:.0f} s left"
        self._say(f"{self.name}: about {self.before + done}{left}, {rate:.2f} answers/s")
