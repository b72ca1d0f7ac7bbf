"""The configuration of ``megavg/evaluate.py``: every section, every option, and how the command line becomes one.

Nothing here imports torch, so ``--help`` and a typo are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from megavg.data.prompts import check_text, check_texts
from megavg.protocols.config import ConfigError, build, read_command_line, to_tree
from megavg.protocols.options import StageOptions
from megavg.protocols.plugin import nearest
from megavg.protocols.sample import TASKS
from megavg.trainer.config import ModelConfig, ParallelConfig

_RESULTS = ("results.json", "results.md")


@dataclass(frozen=True)
class PromptConfig:
    """What is asked, and what a broken record means; the options that a training has in its section ``data``.

    Attributes:
        prompt: one question for every sample; ``{expression}`` is replaced by the sample's. Empty asks with the
            family's own text for the sample's task.
        prompts: task (rec, point, detection, classification) -> a text to ask with instead.
        prompts_file: YAML file of such texts, as those in megavg/data/prompt_texts, or a training's prompts.yaml.
        thinking: take the texts that ask for thoughts before the answer.
        on_error: ``raise`` on a broken record, or ``skip`` and count it.
        max_skipped: more skipped records of a set than this end the run.
    """

    prompt: str = ""
    prompts: dict = field(default_factory=dict)
    prompts_file: str = ""
    thinking: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: int = 100

    def __post_init__(self):
        if self.prompt:
            check_text(self.prompt, "prompt")
        check_texts(self.prompts, TASKS, "prompts")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped={self.max_skipped} must be at least 0")


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated: greedily.

    Attributes:
        max_new_tokens: longest answer, the end token included; detection and thoughts need more than one box.
        prompts_per_pass: prompts answered at once on a rank; bounds the memory of the cache. After each pass the
            answers are on the disk.
    """

    max_new_tokens: int = 256
    prompts_per_pass: int = 16

    def __post_init__(self):
        for name in ("max_new_tokens", "prompts_per_pass"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class SetConfig:
    """One set of samples.

    Attributes:
        shards: webdataset tars: paths, globs, brace ranges or folders.
        benchmark: the table that papers show: refcoco (by dataset and split), screenspot (by platform and kind of
            target), screenspot_pro (by group of applications and kind), detection, classification; auto takes the one
            that the records fit, or none.
        task: ask every sample as "rec" (for its box) or "point" (for a point in it); empty leaves each its own task. A
            sample of detection or classification, which can be asked as neither, ends the run.
        where: name in a record -> the value, or list of values, that it must have to be in the set, as in
            {split: [testA, testB]}.
        group_by: names in the records to break the figures down by, instead of the benchmark's.
    """

    shards: list[str]
    benchmark: Literal["auto", "refcoco", "screenspot", "screenspot_pro", "detection", "classification"] = "auto"
    task: Literal["", "rec", "point"] = ""
    where: dict = field(default_factory=dict)
    group_by: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.shards:
            raise ValueError("shards is empty; name at least one path, glob, brace range or folder")


@dataclass(frozen=True)
class SetsConfig:
    """What is evaluated, and where the results go.

    Attributes:
        sets: name -> a list of shards, or a section ``SetConfig``. A name is letters, digits, ``_``, ``-``, ``+`` and
            ``.``, as folders of ``output_dir`` are named after it; not results.json or results.md, which lie there.
        output_dir: results.json and results.md, and a folder for each set. A second run there answers only what is
            missing, in whatever layout.
        limit: at most so many samples of each set, the first ones; 0 takes all.
        worst: how many of the worst answers of each set are drawn.
        overwrite: begin anew, and remove the answers that ``output_dir`` holds to these sets. Leave it off to go on
            after a kill.
    """

    sets: dict
    output_dir: str
    limit: int = 0
    worst: int = 12
    overwrite: bool = False

    def __post_init__(self):
        if not self.sets:
            raise ValueError("sets is empty; give at least one, such as sets.val=[shards/val]")
        for name in ("limit", "worst"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        found = {}
        for name, value in self.sets.items():
            if not re.fullmatch(r"[\w+-][\w.+-]*", str(name)):
                raise ValueError(f"sets: the name {name!r} may only hold letters, digits, '_', '-', '+' and '.'")
            if str(name).lower().removesuffix(".tmp") in _RESULTS:
                raise ValueError(f"sets: the name {name!r} is that of a file of results in output_dir; choose another")
            value = {"shards": value} if isinstance(value, list) else value
            if not isinstance(value, (dict, SetConfig)):
                raise ValueError(f"sets.{name}: expected a list of shards or a section with shards, got {value!r}")
            found[str(name)] = value if isinstance(value, SetConfig) else build(SetConfig, value,
                                                                               f"evaluation.sets.{name}")
        object.__setattr__(self, "sets", found)


@dataclass(frozen=True)
class EvaluateConfig:
    """The whole configuration of an evaluation."""

    model: ModelConfig
    evaluation: SetsConfig
    data: PromptConfig = field(default_factory=PromptConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def stage_options(self) -> StageOptions:
        """What the model's stages need to know of this configuration."""
        return StageOptions(pipeline_layers=tuple(self.parallel.pipeline_layers),
                            image_token_share=self.parallel.image_token_share)

    def tree(self) -> dict[str, Any]:
        """The resolved configuration as it can be written to YAML and read again."""
        return to_tree(self)


def resolve(tree: dict) -> EvaluateConfig:
    """Check a whole configuration tree."""
    sections = {f.name for f in dataclasses.fields(EvaluateConfig)}
    for key in tree:
        if key not in sections:
            raise ConfigError(f"unknown section {key}{nearest(str(key), sections)}")
    return build(EvaluateConfig, tree)


def parse_command_line(argv: list[str] | None = None) -> EvaluateConfig:
    """``--config FILE section.key=value ...`` -> the checked configuration."""
    parser = argparse.ArgumentParser(
        prog="deepspeed megavg/evaluate.py",
        description="Measure a Qwen-VL checkpoint on sets of shards: RefCOCO, ScreenSpot, detection, classification.",
        epilog="Example:\n  deepspeed --num_gpus 2 megavg/evaluate.py --config examples/evaluate_refcoco.yaml "
               "model.path=runs/my/hf evaluation.output_dir=runs/my/refcoco\n\n"
               "Sections: model, data, parallel, generation, evaluation.\n"
               "Every option is documented in megavg/trainer/evaluate_config.py; an unknown one is an error.\n"
               "A run that was killed goes on where it was when the same command is given again.")
    return resolve(read_command_line(parser, argv))
