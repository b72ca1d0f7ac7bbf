"""Gradients of the entropy to the pixels equal torch's through transformers' model, and leave training as it is."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from megavg.models.layers.lm_head import LMHead
from megavg.protocols.options import HeadOptions, OptimizerConfig, StageOptions, ZeroConfig
from tests.distributed import run_ranks
from tests.tiny_models import (builder_of, encode_pictures, hf_logits, hf_model, processor_of, random_answers,
                               sharpened)

pytestmark = pytest.mark.slow

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FIELDS = {"vision_depth": 2, "num_layers": 5}  # the deepstack enters the first 2 layers
WORLD = 4
LAYOUTS = {"DP4": (1, 1), "TP2 x DP2": (2, 1), "PP2 x DP2": (1, 2), "TP2 x PP2": (2, 2)}
PROMPT_OF_ROW, LENGTHS = (0, 0, 2, 1, 3, 4, 1, 0), (5, 1, 9, 4, 12, 3, 2, 7)
PARTS = ((0, 1, 2), (5,), (3, 4), (6, 7))
"""Rows of each micro-batch: two that share an image, one without an image, one and two images."""
TEMPERATURE, BOUND = 0.7, 1e-5
WEIGHT_STEP = 0.01


class Case(NamedTuple):
    """How a ZeRO-3 engine is laid out, with options that change what DeepSpeed's hooks do."""

    layout: str
    options: StageOptions = StageOptions()
    zero: ZeroConfig = ZeroConfig()
    is_trained: bool = True

    def __str__(self) -> str:
        names = [name for part in (self.options, self.zero) for name, value in vars(part).items()
                 if value is True or name == "param_persistence_threshold" and value]
        return "-".join([self.layout.replace(" ", ""), *names, *([] if self.is_trained else ["reference"])])


ENGINES = [
    Case("DP4"), Case("DP4", StageOptions(recompute=True), ZeroConfig(param_persistence_threshold=100_000)),
    Case("DP4", is_trained=False), Case("TP2 x DP2", StageOptions(freeze_vision_tower=True)),
    Case("PP2 x DP2"), Case("PP2 x DP2", StageOptions(recompute=True), ZeroConfig(keep_gathered=True)),
    Case("TP2 x PP2", StageOptions(freeze_projector=True)),
]
ENGINE_FAMILY = "qwen3_vl"
ALL_CUT = "TP2 x PP2"
# one family goes through all layouts, the others through the one that cuts both ways
COPIES = [(family, layout) for family in FAMILIES for layout in LAYOUTS if family == ENGINE_FAMILY or layout == ALL_CUT]


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {family: sharpened(checkpoints(family, **FIELDS)) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders):
    """The gradient of each micro-batch by transformers and torch in float64, by family."""
    return {family: _by_transformers(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def measured(folders):
    """What every rank found, by (family, layout) for plain copies and by case for engines."""
    ranks = run_ranks(WORLD, _measure_all, {family: str(folder) for family, folder in folders.items()}, timeout=600)
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


@pytest.mark.parametrize(("family", "layout"), COPIES)
def test_a_plain_copy_equals_transformers(measured, expected, family, layout):
    for rank in measured[family, layout]:
        _compare(rank["gradients"], expected[family])
        assert rank["bits differ"] == 0 and not rank["parameters with a gradient"]


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_a_partitioned_stage_equals_transformers(measured, expected, case):
    for rank in measured[case]:
        _compare(rank["gradients"], expected[ENGINE_FAMILY])
        assert rank["bits differ"] == 0 and not rank["parameters with a gradient"]


@pytest.mark.parametrize("case", [case for case in ENGINES if case.is_trained], ids=str)
def test_training_goes_on_as_if_nothing_had_been(measured, case):
    """Gradients, norms and weights after two updates, with passes before, between and after, to the last bit."""
    for rank in measured[case]:
        assert rank["gradients changed"] == [] and rank["trained changed"] == []
        assert rank["largest gradient"] > 0
        assert rank["norms differ"] == [] and rank["weights differ"] == [] and rank["weights moved"] > WEIGHT_STEP / 2


def test_a_sum_that_weighs_otherwise_is_seen(expected):
    """The bound would not hide a lost weight: those of a micro-batch differ, in sign as well."""
    weights = _weights()
    assert all(float(part.std()) > 0.1 and (part < 0).any() and (part > 0).any() for part in weights)
    assert all(float(part.norm()) > 1e-3 for i in (0, 2, 3) for part in [expected["qwen3_vl"][i]])
    assert expected["qwen3_vl"][1].numel() == 0


@pytest.mark.parametrize("is_trained", [True, False])
def test_only_an_updates_backward_counts_what_the_head_leaves_out(is_trained):
    generator = torch.Generator().manual_seed(0)
    head = LMHead(8, 3000, 3000, SimpleNamespace(tp_size=1, tp_rank=0), torch.float32, HeadOptions(skip_mass=0.5))
    head.weight.data.normal_(generator=generator)
    head.weight.requires_grad_(is_trained)
    hidden = torch.randn(5, 8, generator=generator).requires_grad_()
    head(hidden, torch.zeros(5, dtype=torch.int64), 1.0)[1].sum().backward()
    assert hidden.grad.any() and bool(head.dropped_mass > 0) == is_trained


def _compare(found: dict[int, torch.Tensor], expected: list[torch.Tensor]) -> None:
    for i, gradient in found.items():
        assert gradient.dtype == torch.float32 and gradient.shape == expected[i].shape
        if gradient.numel():
            difference = (gradient.double() - expected[i]).abs()
            assert float(difference.norm() / expected[i].norm()) <= BOUND
            assert float(difference.max() / expected[i].abs().max()) <= BOUND


def _examples(processor) -> tuple[list, list[list[int]]]:
    return [*encode_pictures(processor), processor.encode_prompt([], "which way is up?")], \
        random_answers(processor, LENGTHS)


def _weights() -> list[torch.Tensor]:
    """Of each micro-batch's scored positions."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sum(LENGTHS[row] for row in rows), generator=generator) for rows in PARTS]


def _used(rows) -> list[int]:
    return sorted({PROMPT_OF_ROW[row] for row in rows})


def _by_transformers(folder: Path) -> list[torch.Tensor]:
    from megavg.models.base import load_model

    model = hf_model(folder, torch.float64)
    prompts, answers = _examples(processor_of(folder, load_model(folder)))
    found = []
    for rows, weights in zip(PARTS, _weights()):
        pixels = {p: prompts[p].pixel_values.double().requires_grad_() for p in _used(rows)}
        entropies = []
        for row in rows:
            prompt = dataclasses.replace(prompts[PROMPT_OF_ROW[row]], pixel_values=pixels[PROMPT_OF_ROW[row]])
            logits = hf_logits(model, prompt, answers[row])[len(prompt.input_ids) - 1:-1].double()
            logp = (logits / TEMPERATURE).log_softmax(-1)
            entropies.append(-(logp.exp() * logp).sum(-1))
        loss = (weights.double() * torch.cat(entropies)).sum()
        leaves = [leaf for leaf in pixels.values() if leaf.numel()]
        found.append(torch.cat([*(torch.autograd.grad(loss, leaves) if leaves else []),
                                torch.zeros(0, *prompts[0].pixel_values.shape[1:])]))
    return found


def _measure_all(folders: dict[str, str]) -> dict:
    from megavg.parallel.mcore import make_context

    found: dict = {}
    for layout, sizes in LAYOUTS.items():  # DeepSpeed wants those of one stage first
        context = make_context(*sizes, torch.device("cpu"))
        for family, folder in folders.items():
            if (family, layout) in COPIES:
                found[family, layout] = _plain(Path(folder), context)
        for case in ENGINES:
            if case.layout == layout:
                found[case] = _engine(case, Path(folders[ENGINE_FAMILY]), context)
                gc.collect()
    return found


class _Batches:
    """This data-parallel rank's micro-batches: all of them, each rank beginning with another one."""

    def __init__(self, model, folder: Path, context):
        self.processor = processor_of(folder, model)
        self.builder = builder_of(model, self.processor, context)
        self.builder.with_images = context.is_first_stage
        self.prompts, self.answers = _examples(self.processor)
        self.order = [(i + context.dp_rank) % len(PARTS) for i in range(len(PARTS))]
        self.num_scored = [sum(LENGTHS[row] for row in PARTS[i]) for i in self.order]
        self.num_patches = [sum(self.prompts[p].pixel_values.shape[0] for p in _used(PARTS[i])) for i in self.order]
        self.weights = [_weights()[i] for i in self.order]

    def build(self, i: int):
        rows = PARTS[self.order[i]]
        used = _used(rows)
        return self.builder.build([self.prompts[p] for p in used], [used.index(PROMPT_OF_ROW[row]) for row in rows],
                                  [self.answers[row] for row in rows])

    def gradients(self, of) -> dict[int, torch.Tensor]:
        found = of.entropy_gradients(self.num_scored, self.num_patches, self.build, self.weights, TEMPERATURE)
        return dict(zip(self.order, found, strict=True))


def _checked(batches: _Batches, of, context) -> dict:
    """Gradients, and whether those of the first rank with the same data are the same."""
    import torch.distributed as dist

    gradients = batches.gradients(of)
    ranks: list = [None] * context.world_size
    dist.all_gather_object(ranks, (context.dp_rank, [gradients[i] for i in range(len(PARTS))]))
    twins = [parts for dp_rank, parts in ranks if dp_rank == context.dp_rank]
    differing = sum(not torch.equal(a, b) for parts in twins for a, b in zip(parts, twins[0]))
    return {"gradients": gradients, "bits differ": differing,
            "parameters with a gradient": [n for n, p in of.stage.named_parameters() if p.grad is not None]}


def _plain(folder: Path, context) -> dict:
    from megavg.models.base import load_model
    from megavg.rollout.native import NativeGenerator

    model = load_model(folder)
    batches = _Batches(model, folder, context)
    generator = NativeGenerator(model, batches.builder, context, torch.float32, batches.processor.end_token_ids,
                                batches.processor.forbidden_token_ids)
    generator.load_weights(model.hf_weights(generator.stage, context))
    return _checked(batches, generator, context)


def _engine(case: Case, folder: Path, context) -> dict:
    engine, batches = _started(case, folder, context)
    found = _checked(batches, engine, context)
    if not case.is_trained:
        return found
    made = _train(engine, batches, with_passes=True)
    del engine
    untouched = _train(*_started(case, folder, context), with_passes=False)
    weights, norms = (zip(made[key], untouched[key], strict=True) for key in ("weights", "norms"))
    found["weights differ"] = [name for (name, ours), (_, theirs) in weights if not torch.equal(ours, theirs)]
    found["norms differ"] = [pair for pair in norms if pair[0] != pair[1]]
    return {**made, **found, "weights": None}


def _started(case: Case, folder: Path, context):
    from megavg.models.base import copy_weights, load_model
    from megavg.parallel.engine import ZeroEngine

    model = load_model(folder, case.options)
    stage = model.build_stage(context, torch.float32)
    copy_weights(stage, model.hf_weights(stage, context))
    optimizer = OptimizerConfig(gradient_clipping=1.0) if case.is_trained else None
    return ZeroEngine(stage, context, torch.float32, case.zero, optimizer), _Batches(model, folder, context)


def _train(engine, batches: _Batches, with_passes: bool) -> dict:
    """Two updates, with passes for pixels wherever one could be."""
    flags = {name: p.requires_grad for name, p in engine.stage.named_parameters()}
    start = {name: weight.clone() for name, weight in engine.weights()}
    found: dict = {"norms": [], "gradients changed": []}

    def loss(i: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return -(batches.weights[i] * logprobs).sum() - 0.3 * (batches.weights[i].abs() * entropy).sum()

    for _ in range(2):
        if with_passes:
            batches.gradients(engine)
        engine.forward_backward(len(PARTS), batches.build, loss, TEMPERATURE)
        if with_passes:
            before = {name: gradient.clone() for name, gradient in engine.gradients()}
            batches.gradients(engine)
            found["gradients changed"] += [name for name, gradient in engine.gradients()
                                           if not torch.equal(gradient, before[name])]
            found["largest gradient"] = max(float(gradient.abs().max()) for gradient in before.values())
        found["norms"].append(engine.step(WEIGHT_STEP))
    found["weights"] = [(name, weight.clone()) for name, weight in engine.weights()]
    found["weights moved"] = max(float((weight - start[name]).abs().max()) for name, weight in found["weights"])
    found["trained changed"] = [name for name, p in engine.stage.named_parameters() if p.requires_grad != flags[name]]
    return found
