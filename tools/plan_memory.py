"""Bytes of one GPU in a layout, kind by kind, by the formulas of docs/layouts.md and docs/choosing_a_layout.md."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megavg.models.base import DTYPES, Model, load_model
from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import IGNORE, ModelInputs
from megavg.protocols.options import ZeroConfig
from tools.layout_memory import StageSizes, predicted, sizes_of
from tools.layouts import Layout
from tools.plan_work import Work

_BUCKET = ZeroConfig().reduce_bucket_size
_SAMPLING_BYTES = 32
"""Per answer and word: logits, scaled, allowed and as probabilities in fp32, then in float64 and summed up."""
_HEAD_TILES = 24 << 20
"""At most: 8 MB of tiles of logits, and 16 MB for the gradient of one block of columns."""


@dataclass(frozen=True)
class Prediction:
    """Bytes of the worst rank of a layout.

    Attributes:
        stage: the pipeline stage that it is on.
        layers: decoder layers of each stage.
        kinds: bytes of each kind, as ``stage_bytes`` names them.
        host: bytes in host memory, of what is offloaded.
        total: at the moment that takes most, whose name is ``moment``.
    """

    layout: Layout
    work: Work
    stage: int
    layers: list[int]
    kinds: dict[str, float]
    host: float
    total: float
    moment: str


def model_of(configuration: dict) -> Model:
    """The model of a Hugging Face configuration, opened as a checkpoint is but without weights.

    Raises:
        ValueError: its ``model_type`` is no family of megavg.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(configuration))
        save_file({}, Path(folder) / "model.safetensors")
        model = load_model(folder)
    with torch.device("meta"):
        tower = model.spec.make_vision_tower(model.config.vision_config)
    # every stage of every layout asks for the tower, which takes longer to make than all the rest
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, make_vision_tower=lambda config: tower))


class Predictor:
    """Predicts the memory of layouts of one model; remembers what it has worked out.

    Args:
        model: as ``model_of`` gives it.

    Attributes:
        predict: (layout, work) -> the ``Prediction`` of the rank that needs most.
    """

    def __init__(self, model: Model):
        self.model = model
        self._layers = functools.lru_cache(maxsize=None)(self._stage_layers)
        self.predict = functools.lru_cache(maxsize=None)(self._predict)

    def _predict(self, layout: Layout, work: Work) -> Prediction:
        """The rank that needs most.

        Raises:
            ValueError: the model or the work does not allow the layout; says which option to change.
        """
        self.model.dims.check(layout.tp)
        work.check(layout.dp)
        layers = self._layers(layout.pp, work.freeze_vision_tower)
        stages = [self._stage(layout, rank, work, layers) for rank in range(layout.pp)]
        return max(stages, key=lambda found: found.total)

    def _stage_layers(self, pp: int, frozen: bool) -> tuple[int, ...]:
        options = dataclasses.replace(self.model.options, freeze_vision_tower=frozen)
        return tuple(len(part) for part in dataclasses.replace(self.model, options=options).stage_layers(pp))

    def _stage(self, layout: Layout, rank: int, work: Work, layers: tuple[int, ...]) -> Prediction:
        options = dataclasses.replace(self.model.options, freeze_vision_tower=work.freeze_vision_tower,
                                      recompute=work.recompute, pipeline_layers=layers)
        sizes = sizes_of(dataclasses.replace(self.model, options=options), _context(layout, rank),
                         DTYPES[work.dtype], work.num_micro_batches(layout.dp))
        kinds = stage_bytes(sizes, work, self.model.config.vision_config.spatial_merge_size**2)
        host = 0.0
        if work.offload:
            host = kinds["gradients"] + kinds["optimiser"]
            kinds |= {"gradients": 0.0, "optimiser": 0.0, "second gradients": 0.0}
        moments = moments_of(kinds)
        worst = max(moments, key=moments.get)
        return Prediction(layout, work, rank, list(layers), kinds, host, moments[worst], worst)


def stage_bytes(s: StageSizes, work: Work, merge: int) -> dict[str, float]:
    """Bytes of every kind on one rank of a stage, with nothing offloaded; ``merge`` patches become one token."""
    state = predicted(s, _inputs(*work.micro_batch_sizes(merge), s.patch_dim))
    weights = state["parameters"] * s.dp_size
    prompts, length = work.pass_prompts(s.dp_size), work.prompt_length(merge)
    in_group = math.ceil(prompts / s.pp_size)  # over stages the prompts go round in groups, one at a time on a stage
    return {
        **{kind: state[kind] for kind in ("parameters", "gradients", "optimiser")},
        "rollout copy": weights,
        "reference": state["parameters"] if work.reference else 0.0,
        "activations": state["activations"],
        "gathered": min(3 * _largest_piece(s), 2 * weights),
        "head tiles": _head_bytes(s, work) if s.is_last else 0.0,
        "second gradients": state["gradients"],
        "cache": cache_bytes(s, prompts, length, prompts * work.group_size, work.answer_tokens),
        "prefill": _prefill_bytes(s, in_group, length, work.image_patches),
        "sampling": _SAMPLING_BYTES * in_group * work.group_size * s.dims.vocab_size if s.is_last else 0.0,
        "whole weights": weights,
    }


def moments_of(kinds: dict[str, float]) -> dict[str, float]:
    """Bytes at each moment of a run: what stands, and what the moment adds."""
    standing = sum(kinds[kind] for kind in ("parameters", "gradients", "optimiser", "rollout copy", "reference"))
    return {
        "update": standing + kinds["activations"] + kinds["gathered"] + kinds["head tiles"],
        "optimiser's step": standing + kinds["second gradients"],
        "rollout": standing + kinds["cache"] + max(kinds["prefill"], kinds["sampling"]),
        # the stage is built whole before ZeRO-3 divides it; a reference's, after the trained one's
        "start": (standing if kinds["reference"] else kinds["rollout copy"]) + kinds["whole weights"],
    }


def cache_bytes(s: StageSizes, prompts: int, length: int, rows: int, answer_tokens: int) -> float:
    """Keys and values of one rank: of ``prompts`` padded to ``length`` tokens, and room for ``rows`` answers."""
    heads = s.dims.num_kv_heads * s.dims.kv_copies(s.tp_size) // s.tp_size
    return 2.0 * s.layers * heads * s.dims.head_dim * s.itemsize * (prompts * length + rows * answer_tokens)


def _prefill_bytes(s: StageSizes, prompts: int, length: int, image_patches: int) -> float:
    """While prompts are read: the larger of one decoder layer, and one vision block and the projector."""
    one = dataclasses.replace(s, layers=1, is_first=False, is_last=False, in_flight=1, recompute=False)
    layer = predicted(one, _inputs(prompts * length, 0, 0, s.patch_dim))["activations"]
    if not s.is_first:
        return layer
    tower = dataclasses.replace(one, layers=0, is_first=True, vision_depth=1, vision_is_trained=True)
    return max(layer, predicted(tower, _inputs(0, prompts * image_patches, 0, s.patch_dim))["activations"])


def _largest_piece(s: StageSizes) -> float:
    """Bytes of the largest piece that ZeRO-3 gathers: a layer, a vision block, a table, or a bucket of gradients."""
    alone = dataclasses.replace(s, is_first=False, is_last=False, layers=1, dp_size=1)
    layer = predicted(alone, _inputs(0, 0, 0, s.patch_dim))["parameters"] / s.itemsize
    block = (s.vision_numel - s.projector_numel) / s.vision_depth if s.is_first else 0
    table = s.dims.padded_vocab_size(s.tp_size) / s.tp_size * s.dims.hidden_size if s.is_first or s.is_last else 0
    return s.itemsize * max(layer, block, table, _BUCKET)


def _head_bytes(s: StageSizes, work: Work) -> float:
    """The vocabulary op's, by docs/vocab_op.md."""
    scored = work.micro_batch * work.answer_tokens
    gradient = 4 * scored * s.dims.hidden_size  # fp32, before it is rounded
    return _HEAD_TILES + 16 * scored * s.tp_size + gradient * (2 if s.itemsize < 4 else 1)


def _context(layout: Layout, rank: int) -> ParallelContext:
    """Where a rank of stage ``rank`` is, without processes."""
    return ParallelContext(layout.num_processes, rank * layout.tp * layout.dp, layout.tp, 0, None, layout.pp, rank,
                           None, layout.dp, 0, None, torch.device("meta"))


def _inputs(tokens: int, patches: int, scored: int, patch_dim: int) -> ModelInputs:
    """Inputs of these sizes; ``predicted`` looks at nothing else of them."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE)
    targets[:, :scored] = 0
    return ModelInputs(ids, ids.expand(3, -1, -1), targets, torch.zeros(1, 1).expand(patches, patch_dim), ids, ids)
