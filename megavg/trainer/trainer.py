"""The loop in verbs: sample prompts, roll out, judge, score, update, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist

from megavg.data.prompts import Prompts
from megavg.evaluation.draw import panel
from megavg.evaluation.figures import headline, summary
from megavg.evaluation.worst import answer_tile
from megavg.models.layers.norm import rms_norm_name
from megavg.ops.chance import generator
from megavg.ops.perturb import perturb
from megavg.parallel.mcore import make_context, start_processes
from megavg.parallel.watchdog import Watchdog
from megavg.protocols.batch import EncodedPrompt, PolicySignal, RolloutBatch, TokenScores
from megavg.rewards.base import load_rewards
from megavg.trainer.answer_table import answer_table, shown_answers
from megavg.trainer.bad_data import BadData, told_to_all
from megavg.trainer.collect import Collector, make_source
from megavg.trainer.config import RunConfig, algorithm_class
from megavg.trainer.diagnostics import diagnose, kind_metrics
from megavg.trainer.evaluator import Evaluator
from megavg.trainer.metrics import PhaseClock, batch_metrics, judgement_metrics, rollout_metrics
from megavg.trainer.policy import Policy
from megavg.trainer.prompt_log import PromptLog, write_prompts
from megavg.trainer.rollouts import Judgement, Rollouts, to_batch
from megavg.trainer.run_folder import FINISHED, RunFolder
from megavg.trainer.run_log import RunLog, write_json
from megavg.trainer.saving import RunState
from megavg.trainer.start_checks import check_start
from megavg.trainer.step import MicroBatcher, make_signal, micro_batch_loss
from megavg.trainer.stop_signal import EXIT_STATUS, MARKER, StopSignal
from megavg.trainer.token_kinds import TokenKinds


class Trainer:
    """One run, on every process of it."""

    def __init__(self, config: RunConfig):
        self.run_folder = RunFolder(config)
        self.folder, config = self.run_folder.path, self.run_folder.config
        self.config, self.settings = config, config.trainer
        parallel = config.parallel
        device = start_processes(parallel.timeout_minutes)
        self.context = make_context(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, device,
                                    parallel.timeout_minutes)
        self.watchdog = Watchdog(self.folder / "hang", parallel.watched_seconds).start()
        self.algorithm = algorithm_class(config.algorithm_name)(config.algorithm)
        self.rewards = load_rewards(config.rewards)
        self.run_folder.check()
        if config.data.prompts_per_step % self.context.dp_size:
            raise ValueError(f"data.prompts_per_step={config.data.prompts_per_step} is not divisible by the "
                             f"data-parallel size {self.context.dp_size} of {self.context.layout}; change "
                             "data.prompts_per_step or the number of processes")
        self.source = make_source(config.data, config.data.prompts_per_step, self.settings.seed, self.context,
                                  config.data.noise)
        self.policy = Policy(config.model, config.optimizer, parallel.zero, self.context,
                             with_reference=getattr(config.algorithm, "kl_coefficient", 0.0) != 0.0,
                             prompts_per_pass=config.rollout.prompts_per_pass, options=config.stage_options())
        self.prompts = Prompts(self.policy.model.spec.family, config.data.prompt, config.data.prompts,
                               config.data.prompts_file, config.data.thinking)
        self.evaluator = Evaluator(
            self.policy, self.context, self.prompts.question, config.rollout.max_new_tokens,
            config.rollout.prompts_per_pass * 4, config.evaluation.limit, config.evaluation.pictures,
            config.data.on_error, config.data.max_skipped)
        self.state = RunState(config, self.policy, self.source, self.algorithm, self.context, self._tell)
        self.start_step = self.state.restore() if self.settings.resume else 0
        self.frame_report = None if self.start_step else check_start(
            config, self.policy, self.prompts, self.context, self.algorithm.uses_rollouts)
        self._prepare_folder()
        self.log = RunLog(self.folder, self.context.is_writer, self.settings.num_steps, self.start_step,
                          self.settings.log_every, self.settings.tensorboard)
        self.clock, self.kinds = PhaseClock(device), TokenKinds(self.policy.processor)
        self.batcher = MicroBatcher(self.settings, self.context)
        self.collector = Collector(self.policy, self.source, self.algorithm, self.rewards, config, self.context,
                                   self.batcher, self.clock,
                                   PromptLog(self.prompts, self.policy.processor, self.log.say))

    def run(self) -> int:
        """Train to the last step, with the evaluations, checkpoints and the export that were asked for.

        Returns the exit status: 0, or ``EXIT_STATUS`` after a signal, on which the run has saved itself.
        """
        with self.watchdog:
            return self._run()

    def _run(self) -> int:
        with self.log, self._save_finished():
            self._announce()
            with StopSignal(self.context) as stop:
                signal = self._train(stop)
                self.watchdog.beat(self.settings.num_steps, "end")
                self.state.wait()
                if self.settings.export_hf and not signal:  # a signal that comes now finds a run that is ending
                    self.policy.export_hf(self.folder / "hf")
                    self.log.say(f"the trained model is in {self.folder / 'hf'}")
            self.source.close()
            if not signal:
                self.log.finish()
                if self.context.is_writer:
                    self._write_facts(finished=True)
        dist.barrier()  # nobody leaves before all is written
        return EXIT_STATUS if signal else 0

    @contextlib.contextmanager
    def _save_finished(self) -> Iterator[None]:
        """See to it that what is being written in the background is whole when bad data, told to all, end the run."""
        try:
            yield
        except BadData:
            self.state.wait()
            raise

    def _train(self, stop: StopSignal) -> str | None:
        """Take the steps that are left; returns the name of the signal that ended it before."""
        self._record_kept_results()
        self.evaluate(self.start_step, self._sets_missed())
        reached = self._goal_reached(self._stored_accuracy(self.start_step))
        for step in range(self.start_step, self.start_step if reached else self.settings.num_steps):
            self.train_step(step)
            done = step + 1
            if self.settings.save_every and done % self.settings.save_every == 0:
                self.watchdog.beat(done, "save")
                self.state.save(done)
            signal = stop.agreed()
            if signal:
                self._leave(done, signal)
                return signal
            if self._goal_reached(self.evaluate(done, self._sets_due(done))):
                self.log.say(f"every goal of evaluation.stop_at is reached: the training ends after step {done}")
                break
        return None

    def _leave(self, step: int, signal: str) -> None:
        """Save, and say where to go on."""
        self.watchdog.beat(step, "save")
        path = self.state.save(step)
        self.state.wait()
        if self.context.rank == 0:
            write_json(self.folder / MARKER, {"signal": signal, "step": step, "checkpoint": str(path)})
        self.log.say(f"{signal}: saved {path} and leave; the same command with trainer.resume=auto goes on")

    def train_step(self, step: int) -> None:
        """One optimiser batch, from prompts to the update."""
        progress, started = step / self.settings.num_steps, time.monotonic()
        self.clock.reset()
        judgement = stats = reference = None
        self.watchdog.beat(step + 1, "rollout" if self.algorithm.uses_rollouts else "data")
        if self.algorithm.uses_rollouts:
            rollouts, judgement = self.collector.collect(step, progress)
            batch = self._batch(rollouts, judgement.rewards)
            self.watchdog.beat(step + 1, "score")
            stats, reference = self.score(rollouts)
            self.clock.lap("score")
        else:
            rollouts = self.collector.written()
            batch = self._batch(rollouts, [0.0] * len(rollouts.responses))
        signal = make_signal(self.algorithm, batch, stats, reference, progress)
        self.watchdog.beat(step + 1, "update")
        loss, norm, entropy = self.update(rollouts, signal, step)
        self.clock.lap("update")
        self.watchdog.beat(step + 1, "report")
        metrics = {"loss": loss, "gradient_norm": norm, "lr": self._lr(step),
                   **batch_metrics(batch, stats, entropy, reference), **kind_metrics(batch, stats, signal),
                   **self.algorithm.metrics}
        if self.config.head.skip_mass:
            num_scored = float(batch.all_sum(batch.mask.sum().float())) * self.settings.updates_per_batch
            metrics["head/dropped_mass"] = self.policy.take_dropped_mass() / num_scored
        if judgement:
            metrics |= {**rollout_metrics(batch, stats, rollouts, self.context), **self.collector.metrics,
                        **judgement_metrics(judgement, self.context)}
        self._report(step + 1, metrics, rollouts, judgement, time.monotonic() - started)
        if self.settings.diagnostics_every and (step + 1) % self.settings.diagnostics_every == 0:
            diagnose(self.log, step + 1, rollouts, batch, stats, signal, judgement, self.kinds)

    def score(self, rollouts: Rollouts) -> tuple[TokenScores, torch.Tensor | None]:
        """Log-probs and entropies of the behaviour policy, and log-probs of the reference where one is kept.

        Where the algorithm asks for it, each answer is also scored on a perturbed image of its own.
        """
        prompts, of_row, responses = answers = rollouts.prompts, rollouts.prompt_of_row, rollouts.responses
        reference, how = None, self.algorithm.perturbation
        if self.policy.reference is not None or how is None:
            rows = self.batcher.rows(*answers)
        if self.policy.reference is not None:
            reference = self.policy.reference_logprobs(*answers, rows, rollouts.width, self._temperature)
        if how is None:
            return self.policy.score(*answers, rows, rollouts.width, self._temperature), reference
        layout = self.policy.processor.pixel_layout

        def perturbed(b: int) -> EncodedPrompt:
            prompt, chance = prompts[of_row[b]], generator(f"{rollouts.streams[b]}/perturbation")
            return dataclasses.replace(prompt, pixel_values=perturb(prompt.pixel_values, layout, how, chance))

        rows = self.batcher.paired_rows(*answers)
        return self.policy.score_pairs(*answers, rows, rollouts.width, self._temperature, perturbed), reference

    def update(self, rollouts: Rollouts, signal: PolicySignal, step: int) -> tuple[float, float, torch.Tensor]:
        """Take the optimiser steps on what the algorithm has decided.

        Returns (loss, gradient norm before clipping, this data-parallel rank's sum of entropies), of the last step.
        """
        answers = rollouts.prompts, rollouts.prompt_of_row, rollouts.responses
        rows = self.batcher.rows(*answers)
        token_loss = micro_batch_loss(self.algorithm, signal, rows)
        for _ in range(self.settings.updates_per_batch):
            entropy_sum = torch.zeros((), device=self.context.device)

            def loss(i, logprobs, entropy):
                entropy_sum.add_(entropy.detach().sum())
                return token_loss(i, logprobs, entropy)

            value, norm = self.policy.update(*answers, rows, loss, self._temperature, self._lr(step))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: loss {value}, gradient norm {norm}; lower optimizer.lr, or set "
                                     "model.dtype=float32 to see whether it is rounding")
        return value, norm, self.policy.from_last(entropy_sum)

    def _sets_due(self, step: int) -> list[str]:
        """The sets to evaluate after ``step`` optimiser batches."""
        settings = self.config.evaluation
        at_end = step == self.settings.num_steps and settings.at_end
        due = settings.at_start if step == 0 else at_end or (settings.every and step % settings.every == 0)
        return list(settings.sets) if due else []

    def _sets_missed(self) -> list[str]:
        """The sets due at the first step of this process that no process before it has evaluated."""
        due = self._sets_due(self.start_step)
        return [name for name in due if not self.start_step or not self._result_path(name, self.start_step).exists()]

    def _stored_accuracy(self, step: int) -> dict[str, float | None]:
        """The headline of the sets that were evaluated at ``step``, by this process or the one before it."""
        dist.barrier()  # the writer has written
        paths = {name: self._result_path(name, step) for name in self.config.evaluation.sets}
        return {name: headline(json.loads(path.read_text()))[1] for name, path in paths.items() if path.exists()}

    def _result_path(self, name: str, step: int) -> Path:
        return self.folder / "evaluation" / f"{name}-{step:06d}.json"

    def evaluate(self, step: int, names: list[str]) -> dict[str, float | None]:
        """Measure evaluation sets and keep figures, rows and a picture of each; returns the headline (Acc@0.5 for
        boxes, accuracy for points and classes, mAP for detection) by set, None where it is not defined."""
        accuracy = {}
        for name in names:
            self.watchdog.beat(step, f"evaluation of {name}")
            result, rows, picture = self.evaluator.run(name, self.config.evaluation.sets[name])
            if self.context.is_writer:
                path = self._result_path(name, step)
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"set": name, "step": step, **result, "rows": rows})
                if picture is not None:
                    self.log.picture(step, f"eval/{name}", picture)
            self.log.evaluated(step, name, result)
            self.log.say(f"{name} at step {step}: {summary(result)}")
            accuracy[name] = headline(result)[1]
        return accuracy

    def _record_kept_results(self) -> None:
        """Make up the lines of evaluations whose process was killed between keeping the result and writing its line."""
        for name in self._sets_due(self.start_step) if self.start_step and self.context.is_writer else ():
            path = self._result_path(name, self.start_step)
            if path.exists() and not self.log.has(self.start_step, f"eval/{name}/"):
                self.log.evaluated(self.start_step, name, json.loads(path.read_text()))

    def _goal_reached(self, accuracy: dict[str, float | None]) -> bool:
        goals = self.config.evaluation.stop_at
        return bool(goals) and all((accuracy.get(name) or 0.0) >= goal for name, goal in goals.items())

    def _tell(self, text: str) -> None:
        """One line to the console, before there is a log."""
        if self.context.is_writer:
            print(f"[megavg] {text}", flush=True)

    def _prepare_folder(self) -> None:
        """Make or empty the folder, on the first process, once everything that can be refused has been loaded."""
        anew = not self.state.has_own
        if anew:
            with told_to_all(self.context):
                self.run_folder.check_anew(self._tell)
        dist.barrier()  # all have looked into the folder before one of them writes
        with told_to_all(self.context):
            if self.context.rank == 0:
                self.run_folder.prepare(self.start_step, anew)
                write_prompts(self.prompts, self.folder / "prompts.yaml")

    @property
    def _temperature(self) -> float:
        # greedy rollouts and written answers are scored at temperature 1
        return (self.algorithm.uses_rollouts and self.config.rollout.temperature) or 1.0

    def _lr(self, step: int) -> float:
        return self.config.optimizer.lr_at(step, self.settings.num_steps)

    def _batch(self, rollouts: Rollouts, rewards) -> RolloutBatch:
        return to_batch(rollouts, rewards, self.kinds, self.context,
                        self.config.rollout.max_new_tokens if self.algorithm.uses_rollouts else 0)

    def _announce(self) -> None:
        model = self.policy.model
        self.log.say(f"{model.spec.family} from {self.config.model.path}, {self.config.model.dtype}, "
                     f"{self.context.layout}, ZeRO-3, {self.context.device.type}; algorithm "
                     f"{self.config.algorithm_name} {self.algorithm.mark}")
        self.log.say(f"AdamW by {self.policy.engine.optimizer_name}, RMSNorm by "
                     f"{rms_norm_name(self.context.device.type)}; {self._stages()}")
        if self.start_step:
            self.log.say(f"resumed after step {self.start_step}")
        if self.settings.resume and not self.settings.save_every:
            self.log.say("trainer.save_every=0: only SIGTERM and SIGUSR1 save; after a crash, a hang or the loss of a "
                         "machine the run starts anew")
        if self.frame_report is not None:
            self.log.say(self.frame_report.message())
        self.log.configuration(self.config.tree())
        if self.context.is_writer:
            write_json(self.folder / "deepspeed_config.json", self.policy.engine.config)
            self._write_facts(finished=False)

    def _write_facts(self, finished: bool) -> None:
        write_json(self.folder / "run.json", {
            "layout": self.context.layout, "world_size": self.context.world_size,
            "device": self.context.device.type, "algorithm": self.config.algorithm_name,
            "algorithm_mark": self.algorithm.mark, "family": self.policy.model.spec.family, FINISHED: finished})

    def _stages(self) -> str:
        """Where the decoder's layers lie, for the log."""
        stages = self.policy.model.stage_layers(self.context.pp_size)
        if len(stages) == 1:
            return f"{len(stages[0])} decoder layers in one stage"
        return "decoder layers by stage: " + " | ".join(f"{s.start}..{s.stop - 1}" for s in stages)

    def _report(self, step: int, metrics: dict, rollouts: Rollouts, judgement: Judgement | None, seconds: float):
        tokens = self.context.sum_over_data(self.clock.tensor(rollouts.num_tokens))
        metrics |= {"tokens": int(tokens), "tokens_per_second": float(tokens) / seconds, "time/step": seconds,
                    **self.clock.laps, **self.clock.memory(self.context)}
        metrics |= self.source.metrics()
        self.log.record(step, metrics)
        self.log.progress(step, metrics)
        every = self.settings.picture_every
        if judgement is not None and every and step % every == 0 and self.context.is_writer:
            tiles = [answer_tile(rollouts.samples[b // rollouts.group_size], judgement.rows[b])
                     for b in shown_answers(rollouts)]
            self.log.picture(step, "train/answers", panel(tiles, 4, f"sampled answers at step {step}"))
            self.log.text(step, "train/answers", answer_table(rollouts, judgement, self.prompts.question))
