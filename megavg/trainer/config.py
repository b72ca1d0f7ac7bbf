"""The configuration of a run: every section, every option, and how the command line becomes one of these.

Nothing here imports torch, so ``--help`` and a typo are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavg.data.prompts import check_text, check_texts
from megavg.ops.box_formats import BOX_FORMATS
from megavg.protocols.config import ConfigError, build, read_command_line, to_tree
from megavg.protocols.options import HeadOptions, LabelNoise, OptimizerConfig, SamplingParams, StageOptions, ZeroConfig
from megavg.protocols.plugin import load_module, nearest
from megavg.protocols.sample import TASKS


def _at_least(section, least: int, *names: str) -> None:
    for name in names:
        if getattr(section, name) < least:
            raise ValueError(f"{name}={getattr(section, name)} must be at least {least}")


@dataclass(frozen=True)
class ModelConfig:
    """The starting model.

    Attributes:
        path: Hugging Face checkpoint directory of a Qwen-VL model, or a checkpoint (step-000100) of a run.
        dtype: of parameters and activations; optimiser state is fp32 either way.
        min_pixels, max_pixels: limits of an image after the resize; None takes the checkpoint's own.
        box_format: how answers write boxes and points, and in which frame of coordinates, for a model that was
            fine-tuned to another than its family's: json_relative_1000, json_resized_px or tokens_relative_1000
            (``megavg.ops.box_formats``). Empty takes the family's own.
        freeze_vision_tower: train all but the vision tower's blocks and patch embedding.
        freeze_projector: do not train what maps vision features to the decoder's width (the mergers).
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    min_pixels: int | None = None
    max_pixels: int | None = None
    box_format: str = ""
    freeze_vision_tower: bool = False
    freeze_projector: bool = False

    def __post_init__(self):
        if self.box_format and self.box_format not in BOX_FORMATS:
            raise ValueError(f"box_format={self.box_format!r} does not exist{nearest(self.box_format, BOX_FORMATS)}")


@dataclass(frozen=True)
class ParallelConfig:
    """The layout; what is left of the world after tensor and pipeline parallelism is data parallelism.

    Attributes:
        tensor_model_parallel_size: ranks that share every layer.
        pipeline_model_parallel_size: stages that follow each other; 1F1B over the micro-batches.
        pipeline_layers: decoder layers of each stage; empty divides them by cost, vision tower and head counted.
        image_token_share: share of image tokens in the data, which weighs the vision tower in that division.
        sequence_parallel: split norms and residuals over the tensor-parallel ranks by token (GPU only).
        recompute: keep only the input of each decoder layer and vision block and run it again in the backward.
        zero: how ZeRO-3 partitions over the data-parallel ranks.
        timeout_minutes: a collective that waits longer ends the run.
        hang_timeout_s: seconds after which a run in which no rank moves is told as hung, with the rank that the others
            wait for, and ends with exit status 76; 0 never. Longer than any single call that may take long; half of
            ``timeout_minutes`` is taken where that is less, as torch would end the run first and name nobody.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    pipeline_layers: list[int] = field(default_factory=list)
    image_token_share: float = 0.75
    sequence_parallel: bool = False
    recompute: bool = False
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    timeout_minutes: float = 30.0
    hang_timeout_s: float = 600.0

    def __post_init__(self):
        _at_least(self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        _at_least(self, 0, "hang_timeout_s")
        StageOptions(pipeline_layers=tuple(self.pipeline_layers), image_token_share=self.image_token_share)  # checks
        if self.pipeline_layers and len(self.pipeline_layers) != self.pipeline_model_parallel_size:
            raise ValueError(f"pipeline_layers={self.pipeline_layers} must be one number for each of "
                             f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} stages")

    @property
    def watched_seconds(self) -> float:
        """What the watchdog is given."""
        return min(self.hang_timeout_s, 30 * self.timeout_minutes)


@dataclass(frozen=True)
class MixtureSource:
    """One source of ``data.mixture``: its shards, and its weight beside the others'."""

    shards: list[str]
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Training prompts.

    Attributes:
        shards: webdataset tars: paths, globs, brace ranges, folders, http(s) URLs, or ``pipe:COMMAND``, whose command
            the shell of every process runs: take such lists only from people you trust. URLs are fetched by every
            process.
        mixture: instead of shards: name -> {shards: [...], weight: 2.0}. The source of each sample is drawn by weight.
        prompts_per_step: P of the whole optimiser batch, over all ranks.
        prompt: one question for every sample; ``{expression}`` is replaced by the sample's. Empty asks with the
            family's own text for the sample's task, from megavg/data/prompt_texts.
        prompts: task (rec, point, detection, classification) -> a text to ask with instead.
        prompts_file: YAML file of such texts, as those in megavg/data/prompt_texts; the family's own fill in.
        thinking: take the texts that ask for thoughts before the answer. Supervised fine-tuning then needs a "thought"
            in every record.
        check_frame: before training, let the starting model answer on some known boxes, and ``stop`` or ``warn`` where
            its numbers fit far better in another frame of coordinates, or its answers do not parse; or ``off``.
        check_frame_samples: how many known boxes.
        shuffle_buffer: records held to shuffle among.
        on_error: ``raise`` on a broken record, or ``skip`` and count it.
        max_skipped: more skipped records than this end the run.
        shuffle_bytes: of records that come from URLs, at most so many bytes are held to shuffle among, by each process
            and source; 0 sets no limit.
        num_workers: processes that decode pictures ahead, for each training process; 0 decodes as they are needed.
        prefetch_batches: batches of prompts that they are ahead; their pictures are held decoded.
        noise: wrong labels for a share of the training samples; none by default, never in evaluation.
    """

    shards: list[str] = field(default_factory=list)
    mixture: dict = field(default_factory=dict)
    prompts_per_step: int = 16
    prompt: str = ""
    prompts: dict = field(default_factory=dict)
    prompts_file: str = ""
    thinking: bool = False
    check_frame: Literal["stop", "warn", "off"] = "stop"
    check_frame_samples: int = 8
    shuffle_buffer: int = 1000
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: int = 100
    shuffle_bytes: int = 256 << 20
    num_workers: int = 0
    prefetch_batches: int = 2
    noise: LabelNoise = field(default_factory=LabelNoise)

    def __post_init__(self):
        if self.prompt:
            check_text(self.prompt, "prompt")
        check_texts(self.prompts, TASKS, "prompts")
        _at_least(self, 4, "check_frame_samples")
        _at_least(self, 0, "shuffle_bytes", "num_workers")
        _at_least(self, 1, "prefetch_batches", "shuffle_buffer")
        if bool(self.shards) == bool(self.mixture):
            raise ConfigError("data: give either data.shards (a list) or data.mixture (name -> {shards: [...], weight: "
                              f"1.0}}), {'not both' if self.shards else 'one of them must not be empty'}")
        self.sources()

    def sources(self) -> dict[str, MixtureSource]:
        """The sources of the mixture by name; empty where there is none."""
        sources = {}
        for name, tree in self.mixture.items():
            if not re.fullmatch(r"[\w.-]+", str(name)):
                raise ConfigError(f"data.mixture: the name {name!r} may only hold letters, digits, '_', '-' and '.'")
            source = sources[str(name)] = build(MixtureSource, tree, f"data.mixture.{name}")
            if not source.shards or not 0 < source.weight < float("inf"):
                raise ConfigError(f"data.mixture.{name}: expected one or more shards and a weight above 0, got {tree}")
        return sources

    def all_shards(self) -> list[str]:
        """The patterns of all training shards."""
        return [*self.shards, *(pattern for source in self.sources().values() for pattern in source.shards)]


@dataclass(frozen=True)
class RolloutConfig(SamplingParams):
    """How answers are sampled in training.

    Attributes:
        group_size: G answers per prompt.
        prompts_per_pass: prompts generated for at once on a rank; bounds the memory of the cache.
    """

    group_size: int = 8
    prompts_per_pass: int = 16

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, 1, "group_size", "prompts_per_pass")


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy evaluation on held-out shards.

    Attributes:
        sets: name -> list of shards; a name is letters, digits, ``_``, ``-`` and ``.``, as files are named after it.
        at_start, at_end: evaluate before the first and after the last step.
        every: evaluate every so many steps; 0 never.
        limit: at most so many samples of each set; 0 takes all.
        pictures: samples drawn in the picture of each set.
        stop_at: name of a set -> Acc@0.5 (for points and classes the accuracy, for detection mAP) at which the
            training has reached its goal; it ends early when an evaluation finds all of them reached.
    """

    sets: dict = field(default_factory=dict)
    at_start: bool = True
    at_end: bool = True
    every: int = 0
    limit: int = 0
    pictures: int = 12
    stop_at: dict = field(default_factory=dict)

    def __post_init__(self):
        _at_least(self, 0, "every", "limit", "pictures")
        for name, goal in self.stop_at.items():
            if name not in self.sets:
                raise ValueError(f"stop_at.{name} is not one of the evaluation sets{nearest(str(name), self.sets)}")
            if isinstance(goal, bool) or not isinstance(goal, (int, float)) or not 0 < goal <= 1:
                raise ValueError(f"stop_at.{name}: expected an Acc@0.5 in (0, 1], got {goal!r}")
        if self.stop_at and not self.every:
            raise ValueError("stop_at needs evaluations on the way; set every to a number of steps")
        for name, shards in self.sets.items():
            if not re.fullmatch(r"[\w.-]+", str(name)):
                raise ValueError(f"sets: the name {name!r} may only hold letters, digits, '_', '-' and '.'")
            if not isinstance(shards, list) or not all(isinstance(s, str) for s in shards):
                raise ValueError(f"sets.{name}: expected a list of shards, got {shards!r}")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop.

    Attributes:
        output_dir: where everything of the run goes.
        num_steps: optimiser batches.
        micro_batch_size: answers per forward and backward on a rank, laid end to end without padding; the result does
            not depend on it, nor on the two that follow.
        micro_batch_tokens: at most so many tokens of them, prompts included; 0 sets no limit.
        micro_batch_patches: at most so many image patches of them, which bounds the vision tower's activations; 0 sets
            no limit. An image that several answers share counts once.
        updates_per_batch: optimiser steps on the same answers.
        seed: of the data order and of sampling.
        save_every: steps between checkpoints; 0 saves none but on SIGTERM and SIGUSR1.
        keep_last, keep_every: the newest ``keep_last`` checkpoints are kept, and those whose step is a multiple of
            ``keep_every``; 0 keeps no others.
        save_in_background: copy the state in the host's memory and write it while the training goes on.
        resume: ``auto`` (or true) goes on from the newest whole checkpoint in ``output_dir``, in whatever layout it
            was written, if there is one; a path names a checkpoint, of this run or of another; false starts anew.
        overwrite: start anew in an ``output_dir`` that holds a run, whose files are removed.
        export_hf: write the trained model to ``output_dir``/hf at the end.
        log_every: steps between plain lines where there is no terminal.
        picture_every: steps between pictures of answers; 0 draws none.
        diagnostics_every: steps between histograms and heat maps of the answers' tokens; 0 makes none.
        tensorboard: write TensorBoard events.
    """

    output_dir: str
    num_steps: int = 100
    micro_batch_size: int = 8
    micro_batch_tokens: int = 0
    micro_batch_patches: int = 0
    updates_per_batch: int = 1
    seed: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    save_in_background: bool = False
    resume: bool | str = False
    overwrite: bool = False
    export_hf: bool = True
    log_every: int = 10
    picture_every: int = 50
    diagnostics_every: int = 50
    tensorboard: bool = True

    def __post_init__(self):
        _at_least(self, 1, "num_steps", "micro_batch_size", "updates_per_batch", "keep_last", "log_every")
        _at_least(self, 0, "save_every", "keep_every", "picture_every", "diagnostics_every", "micro_batch_tokens",
                  "micro_batch_patches")
        if self.resume == "":
            raise ValueError("resume is empty; give auto, true, false or the path of a checkpoint")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite cannot both be true")


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration. ``algorithm`` is the ``Config`` of the class that ``algorithm.name`` names."""

    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig
    algorithm_name: str
    algorithm: Any
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[dict] = field(default_factory=lambda: [{"name": "iou"}])
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    head: HeadOptions = field(default_factory=HeadOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def stage_options(self) -> StageOptions:
        """What the model's stages need to know of this configuration."""
        model, parallel = self.model, self.parallel
        return StageOptions(self.head, parallel.recompute, parallel.sequence_parallel, model.freeze_vision_tower,
                            model.freeze_projector, tuple(parallel.pipeline_layers), parallel.image_token_share)

    def tree(self) -> dict:
        """The resolved configuration as it can be written to YAML and read again."""
        tree = to_tree(self)
        tree["algorithm"] = {"name": tree.pop("algorithm_name"), **tree["algorithm"]}
        return tree


def algorithm_class(name: str):
    """The class that ``algorithm.name`` names, several joined by "+"; no torch is imported for those of the package."""
    from megavg.algorithms._compose import compose

    names, classes = name.split("+"), []
    for part in names:
        module = load_module("megavg.algorithms", part, "algorithm.name")
        if not hasattr(module, "ALGORITHM"):
            raise ConfigError(f"algorithm.name={name!r}: module {module.__name__} defines no ALGORITHM")
        classes.append(module.ALGORITHM)
    return compose(names, classes)


def resolve(tree: dict) -> RunConfig:
    """Check a whole configuration tree, plug-ins' options included."""
    from megavg.rewards.base import load_rewards

    tree = dict(tree)
    algorithm = tree.pop("algorithm", None) or {}
    if not isinstance(algorithm, dict) or not isinstance(algorithm.get("name"), str):
        raise ConfigError("missing option algorithm.name; grpo is the plain choice")
    options = {key: value for key, value in algorithm.items() if key != "name"}
    try:
        cls = algorithm_class(algorithm["name"])
        options = build(cls.Config, options, "algorithm")
        sections = {f.name for f in dataclasses.fields(RunConfig)} - {"algorithm_name", "algorithm"}
        for key in tree:
            if key not in sections:
                raise ConfigError(f"unknown section {key}{nearest(str(key), sections | {'algorithm'})}")
        config = build(RunConfig, {**tree, "algorithm_name": algorithm["name"], "algorithm": options})
        load_rewards(config.rewards)
        if cls.uses_rollouts:
            _check_format_reward(config)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    try:
        cls(config.algorithm).check(config.rollout.group_size, config.rollout.max_new_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cls.uses_rollouts and config.rollout.group_size < 2:
        raise ConfigError(f"rollout.group_size={config.rollout.group_size}: {algorithm['name']} compares answers to "
                          "one prompt and needs at least 2")
    return config


def _check_format_reward(config: RunConfig) -> None:
    """Refuse a format reward that forbids the thoughts which the prompts ask for: it would be 0 for ever."""
    for place, entry in enumerate(config.rewards):
        if config.data.thinking and entry["name"] == "format" and not entry.get("thinking", False):
            raise ValueError(f"rewards[{place}] (format): data.thinking=true asks for thoughts, which this reward "
                             "forbids; give it thinking: true")


def parse_command_line(argv: list[str] | None = None) -> RunConfig:
    """``--config FILE section.key=value ...`` -> the checked configuration."""
    parser = argparse.ArgumentParser(
        prog="deepspeed megavg/train.py", description="Train a Qwen-VL model for visual grounding.",
        epilog="Example:\n  deepspeed --num_gpus 2 megavg/train.py --config examples/demo.yaml "
               "parallel.tensor_model_parallel_size=2 algorithm.name=ecvgpo\n\n"
               "Sections: model, parallel, data, rollout, rewards, algorithm, optimizer, head, evaluation, trainer.\n"
               "Every option is documented in megavg/trainer/config.py; an unknown one is an error.")
    return resolve(read_command_line(parser, argv))


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    import yaml

    partial = Path(f"{path}.tmp")
    partial.write_text(yaml.safe_dump(config.tree(), sort_keys=False))
    os.replace(partial, path)
