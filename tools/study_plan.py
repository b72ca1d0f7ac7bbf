"""Read a study's configuration and lay out its runs: which trainings there are, in what order, and what each one is."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavg.protocols.config import ConfigError, apply_overrides, build, read_yaml, to_tree
from megavg.protocols.plugin import nearest
from megavg.trainer.config import algorithm_class, resolve

FIGURES = {
    "acc_at_50": "held-out Acc@0.5",
    "mean_iou": "held-out mean IoU",
    "entropy": "entropy of the last tenth of the steps, nats",
    "entropy_rise": "entropy before 80 % of the steps / at the start",
    "entropy_fall": "entropy at the end / before 80 % of the steps",
    "saei_gain": "rise of the selected tokens' entropy by the attack, nats",
}
"""The figures of a run that a report tells of, and what they are."""

OUT = "{out}"
"""Stands for the study's folder in the trees of its runs, so that a study can be moved."""


@dataclass(frozen=True)
class DataSpec:
    """The drawn scenes; every run of the study reads the same.

    Attributes:
        train, held_out, validation: number of scenes of each set.
        seed: of the training scenes; the other two sets take the seeds after it.
        scenes: options of ``megavg.data.scenes.scenes``, such as size, shapes and colours.
    """

    train: int = 6144
    held_out: int = 256
    validation: int = 128
    seed: int = 1
    scenes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One method: what it changes in the configuration of a run.

    Attributes:
        overrides: dotted option -> value.
        noises: noise levels at which it runs; empty takes all of the study.
        text: a few words for the report.
    """

    overrides: dict = field(default_factory=dict)
    noises: list[float] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Claim:
    """Something a paper says, as a comparison of two sides; a side is a method, or a number.

    Attributes:
        text: the claim in words.
        source: arXiv id of the paper.
        metric: the figure of a run that is compared, one of ``FIGURES``.
        higher, lower: what should be above what.
        noises: noise levels that are compared; empty takes all at which both sides have runs.
        lower_noise: take the lower side's runs at this noise level, whatever the higher side's.
    """

    text: str
    source: str
    metric: str
    higher: float | str
    lower: float | str
    noises: list[float] = field(default_factory=list)
    lower_noise: float | None = None

    def __post_init__(self):
        if self.metric not in FIGURES:
            raise ValueError(f"metric={self.metric!r} does not exist{nearest(self.metric, FIGURES)}")


@dataclass(frozen=True)
class Chart:
    """One chart of the report: a name for its file, a title, and the methods whose curves it shows."""

    name: str
    title: str
    methods: list[str]


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        seeds: each has its own starting weights, warm-up, order of data and sampling.
        noises: shares of training labels that are replaced by wrong ones.
        checkpoint: sizes of the model, fields of ``megavg.models.tiny.TinySpec``.
        data: the scenes.
        warmup, run: configuration of the warm-ups and, before a method changes it, of the runs; paths are filled in.
        methods: name -> method.
        baseline: the method that the others are compared with.
        only: run these methods alone; empty runs all.
        claims, charts: what the report says and shows.
        quick: dotted option of this file -> its value under ``--quick``.
    """

    seeds: list[int]
    noises: list[float]
    checkpoint: dict
    data: DataSpec
    warmup: dict
    run: dict
    methods: dict
    baseline: str = "grpo"
    only: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    quick: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "methods", {name: m if isinstance(m, Method) else build(Method, m, f"methods.{name}")
                                             for name, m in self.methods.items()})
        for option, values in (("seeds", self.seeds), ("noises", self.noises), ("methods", self.methods)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{option}={list(values)}: expected one or more, each once")
        for name in self.methods:
            if not re.fullmatch(r"[\w-]+", str(name)):  # it is a folder, and part of a dotted option
                raise ValueError(f"the method {name!r} may only hold letters, digits, '_' and '-'")
        for name in (self.baseline, *self.only, *(n for chart in self.charts for n in chart.methods),
                     *(side for claim in self.claims for side in (claim.higher, claim.lower) if isinstance(side, str))):
            if name not in self.methods:
                raise ValueError(f"{name!r} is not one of the methods{nearest(name, self.methods)}")

    @property
    def chosen(self) -> list[str]:
        """The methods to run, the baseline first."""
        return sorted((name for name in self.methods if not self.only or name in self.only),
                      key=lambda name: name != self.baseline)

    def noises_of(self, name: str) -> list[float]:
        """The noise levels at which a method runs."""
        wanted = self.methods[name].noises
        return [noise for noise in self.noises if not wanted or noise in wanted]


@dataclass(frozen=True)
class Task:
    """One training: a warm-up or a run.

    Attributes:
        name: its folder below the study's.
        kind: which of both.
        tree: the configuration, with ``OUT`` in its paths.
        key: hash of everything that the result depends on.
        needs: name of the task that must be done before.
        checkpoint: for a warm-up, fields of ``TinySpec`` of the model that it starts from.
        method, noise, seed: what it is.
    """

    name: str
    kind: Literal["warmup", "run"]
    tree: dict
    key: str
    seed: int
    needs: str | None = None
    checkpoint: dict = field(default_factory=dict)
    method: str = ""
    noise: float = 0.0

    def tree_in(self, out: Path) -> dict:
        """The configuration with the study's folder filled in."""
        return _filled(self.tree, str(out))


def read_study(path: str | Path, quick: bool = False, overrides: list[str] | tuple = ()) -> Study:
    """The checked study of a YAML file; ``quick`` applies its section of that name, then come the overrides."""
    tree = read_yaml(path)
    whole = build(Study, tree)
    study = build(Study, apply_overrides(_changed(tree, whole.quick if quick else {}), list(overrides)))
    return study


def check_noises(study: Study) -> None:
    """Refuse a level of a method or of a claim that its study lacks.

    A study made smaller lacks some, which are then left out.
    """
    for name, method in study.methods.items():
        if set(method.noises) - set(study.noises):
            raise ConfigError(f"methods.{name}.noises={method.noises} are not all in noises={study.noises}")
    for claim in study.claims:
        if {*claim.noises, *([] if claim.lower_noise is None else [claim.lower_noise])} - set(study.noises):
            raise ConfigError(f"claim {claim.text!r}: its noise levels are not all in noises={study.noises}")


def save_study(study: Study, path: Path) -> None:
    """Write a study so that ``read_study`` reads it again."""
    import yaml

    path.write_text(yaml.safe_dump(to_tree(study), sort_keys=False))


def plan(study: Study) -> list[Task]:
    """Every training in the order in which they are started: seed by seed, the warm-up first, then the baseline."""
    tasks = []
    for seed in study.seeds:
        warmup = _warmup(study, seed)
        tasks.append(warmup)
        tasks += [_run(study, warmup, name, noise) for name in study.chosen for noise in study.noises_of(name)]
    return tasks


def _warmup(study: Study, seed: int) -> Task:
    name = f"seed{seed}/warmup"
    tree = _changed(study.warmup, _common(name, seed) | {
        "model.path": f"{OUT}/seed{seed}/checkpoint", "evaluation.sets": {"validation": [f"{OUT}/data/validation"]},
        "trainer.export_hf": True})
    checkpoint = {**study.checkpoint, "seed": seed}
    return Task(name, "warmup", tree, _hash(tree, dataclasses.asdict(study.data), checkpoint), seed,
                checkpoint=checkpoint)


def _run(study: Study, warmup: Task, method: str, noise: float) -> Task:
    name = f"seed{warmup.seed}/noise{noise:g}/{method}"
    tree = _changed(study.run, _common(name, warmup.seed) | {
        "model.path": f"{OUT}/{warmup.name}/hf", "evaluation.sets": {"held_out": [f"{OUT}/data/held_out"]},
        "data.noise.probability": noise, "data.noise.seed": warmup.seed, **study.methods[method].overrides})
    return Task(name, "run", tree, _hash(tree, warmup.key), warmup.seed, warmup.name, method=method, noise=noise)


def _common(name: str, seed: int) -> dict:
    return {"data.shards": [f"{OUT}/data/train"], "trainer.output_dir": f"{OUT}/{name}", "trainer.seed": seed,
            "trainer.overwrite": True, "trainer.save_every": 0, "trainer.export_hf": False,
            "trainer.tensorboard": False, "trainer.picture_every": 0, "evaluation.pictures": 0}


def _changed(tree: dict, options: dict) -> dict:
    """A copy with dotted options set."""
    return apply_overrides(tree, [f"{key}={json.dumps(value)}" for key, value in options.items()])


def _hash(tree: dict, *more: Any) -> str:
    """Of the RESOLVED configuration, so that a default that has changed counts as a change."""
    text = json.dumps([resolve(tree).tree(), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _filled(node: Any, out: str) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, out) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, out) for value in node]
    return node.replace(OUT, out) if isinstance(node, str) else copy.copy(node)


def mark_of(study: Study, method: str) -> str:
    """Where a method's definition comes from: [exact], [reported] or [ours]."""
    return algorithm_class(_changed(study.run, study.methods[method].overrides)["algorithm"]["name"]).mark
