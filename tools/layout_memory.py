"""Bytes per rank of a pipeline stage: what is measured of an engine, and what the formulas of docs/layouts.md say."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Callable

import torch

from megavg.models.base import Model
from megavg.models.layers.language_model import DecoderDims
from megavg.parallel.context import ParallelContext
from megavg.parallel.engine import ZeroEngine
from megavg.protocols.batch import IGNORE, ModelInputs

KINDS = ("parameters", "gradients", "optimiser", "activations")
# widths that a vision block keeps for each patch: of the block, of its feed-forward, and of its two norms' inputs
_VISION_BLOCK = {"qwen2_vl": (11, 3, 0), "qwen2_5_vl": (13, 4, 2), "qwen3_vl": (11, 2, 0)}


def measured_state(engine: ZeroEngine) -> dict[str, int]:
    """Bytes of the ZeRO-3 partitions that live between steps; the optimiser's exist after the first step."""
    zero = engine._engine.optimizer  # DeepSpeed's; there is no documented way to its partitions
    parameters = [p.ds_tensor for p in engine.stage.parameters()]
    lying_in = {t.untyped_storage().data_ptr() for t in parameters}
    masters = [t for t in zero.fp32_partitioned_groups_flat if t.untyped_storage().data_ptr() not in lying_in]
    states = [t for state in zero.optimizer.state.values() for t in state.values()
              if torch.is_tensor(t) and t.numel() > 1]
    return {"parameters": _bytes(parameters), "gradients": _bytes([zero.grad_partitions_flat_buffer]),
            "optimiser": _bytes(states + masters)}


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measured_activations(engine: ZeroEngine, run: Callable[[], object]) -> int:
    """Bytes at the peak of ``run``: of what autograd keeps on a CPU, of all that is allocated beyond before on a GPU.

    On a GPU that includes gathered weights and the work memory of kernels.
    """
    if engine.context.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with KeptTensors(engine.stage) as kept:
        run()
    return kept.peak


class KeptTensors:
    """Counts the storages that autograd keeps inside the block, weights left out; ``peak`` is the largest sum.

    Recomputation has hooks of its own, which hide what a block keeps when it is run again in the backward; there a
    second pair of hooks counts and passes on to them.
    """

    def __init__(self, stage: torch.nn.Module):
        self._stage, self._parameters = stage, list(stage.parameters())
        self._uses: dict[int, int] = {}
        self._inner: list = []
        self._handles: list = []
        self.now = self.peak = 0

    def __enter__(self) -> KeptTensors:
        # transformers recomputes a block's forward, not its call, so hooks of the block itself would not run again
        for part in (part for block in self._stage.blocks for part in block.children()):
            self._handles += [part.register_forward_pre_hook(self._before_part),
                              part.register_forward_hook(self._after_part, always_call=True)]
        self._outer = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)
        self._outer.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._outer.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        if self._is_weight(tensor):
            return _Kept(tensor)
        # detached: a node that keeps its own output would otherwise keep itself alive
        kept = _Kept(tensor.detach())
        self._count(tensor.untyped_storage(), kept)
        return kept

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, torch.nn.Parameter) or tensor.untyped_storage().data_ptr() in {
            p.untyped_storage().data_ptr() for p in self._parameters}

    def _count(self, storage: torch.UntypedStorage, user: object) -> None:
        """Count a storage until the last of its users is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._uses:
            self._uses[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._uses[key] += 1
        weakref.finalize(user, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= size

    def _before_part(self, part, arguments) -> None:
        if torch._C._current_graph_task_id() == -1:  # not inside of a backward
            return
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def keep(tensor):
            if not self._is_weight(tensor):
                # recomputation keeps the tensor itself, and drops the graph of its second forward
                self._count(tensor.untyped_storage(), tensor.untyped_storage())
            return pack(tensor)

        self._inner.append(torch.autograd.graph.saved_tensors_hooks(keep, unpack))
        self._inner[-1].__enter__()

    def _after_part(self, part, arguments, output) -> None:
        if torch._C._current_graph_task_id() != -1 and self._inner:
            self._inner.pop().__exit__(None, None, None)


class _Kept:
    """A tensor for as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@dataclass(frozen=True)
class StageSizes:
    """What the formulas need to know of one rank.

    Attributes:
        layers: decoder layers of its stage.
        is_first, is_last: whether the stage has embedding and vision tower; norm and head.
        in_flight: micro-batches whose activations are held at the same time.
        vision_numel, projector_numel, vision_width, vision_ffn, vision_depth, mergers, patch_dim: the vision tower.
        vision_is_trained, recompute: options.
        itemsize: bytes of a number, 4 or 2.
    """

    dims: DecoderDims
    family: str
    tp_size: int
    dp_size: int
    pp_size: int
    layers: int
    is_first: bool
    is_last: bool
    in_flight: int
    vision_numel: int
    projector_numel: int
    vision_width: int
    vision_ffn: int
    vision_depth: int
    mergers: int
    patch_dim: int
    vision_is_trained: bool
    recompute: bool
    itemsize: int


def sizes_of(model: Model, context: ParallelContext, dtype: torch.dtype, num_micro_batches: int) -> StageSizes:
    """The sizes of this rank's stage."""
    with torch.device("meta"):
        tower = model.spec.make_vision_tower(model.config.vision_config)
    vision = model.config.vision_config
    width = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL calls the width that leaves it hidden_size
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    return StageSizes(
        dims=model.dims, family=model.spec.family, tp_size=context.tp_size, dp_size=context.dp_size,
        pp_size=context.pp_size, layers=len(model.stage_layers(context.pp_size)[context.pp_rank]),
        is_first=context.is_first_stage, is_last=context.is_last_stage,
        in_flight=min(context.pp_size - context.pp_rank, num_micro_batches),
        vision_numel=sum(p.numel() for p in tower.parameters()),
        projector_numel=sum(p.numel() for merger in mergers for p in merger.parameters()),
        vision_width=width, vision_ffn=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
        vision_depth=vision.depth, mergers=len(mergers),
        patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        vision_is_trained=not model.options.freeze_vision_tower, recompute=model.options.recompute,
        itemsize=dtype.itemsize)


def predicted(s: StageSizes, inputs: ModelInputs) -> dict[str, float]:
    """Bytes per rank of each kind, by the formulas of docs/layouts.md, for micro-batches like ``inputs``."""
    numel = _parameters(s)
    trained = numel - (s.vision_numel - s.projector_numel if s.is_first and not s.vision_is_trained else 0)
    scored = int((inputs.target_ids != IGNORE).sum())
    return {"parameters": s.itemsize * numel / s.dp_size, "gradients": 4 * trained / s.dp_size,
            "optimiser": 12 * trained / s.dp_size,  # two moments, and a master copy beside fp32 parameters too
            "activations": _activations(s, inputs.input_ids.numel(), inputs.pixel_values.shape[0], scored)}


def _parameters(s: StageSizes) -> float:
    """Numbers of a rank's stage before ZeRO-3 divides them over the data-parallel ranks."""
    d, t, width = s.dims, s.tp_size, s.dims.head_dim
    copies = d.kv_copies(t)
    keys = 2 * width * d.num_kv_heads * copies / t  # rows of keys and values on this rank
    queries = d.num_heads * width / t
    layer = d.hidden_size * (2 * queries + keys + 3 * d.intermediate_size / t) + 2 * d.hidden_size
    layer += (queries + keys if d.qkv_bias else 0) + (2 * width if d.qk_norm else 0)
    table = d.padded_vocab_size(t) * d.hidden_size / t
    tables = s.is_first + (s.is_last and not (d.tie_embeddings and s.pp_size == 1))
    return (s.layers * layer + tables * table + s.is_first * s.vision_numel + s.is_last * d.hidden_size)


def _activations(s: StageSizes, tokens: int, patches: int, scored: int) -> float:
    """Bytes that autograd keeps at the peak of a step."""
    d, e = s.dims, s.itemsize
    layer, block = _layer_bytes(s), _vision_block_bytes(s)
    decoder = s.layers * tokens * (d.hidden_size * e if s.recompute else layer)
    decoder += tokens * 2 * d.head_dim * e  # cosines and sines
    if s.is_last:
        decoder += tokens * d.hidden_size * (4 + e) + scored * d.hidden_size * e
    vision = merger = 0.0
    if s.is_first and s.vision_is_trained:
        vision = patches * (s.patch_dim * e + s.vision_depth * (s.vision_width * e if s.recompute else block))
        merger = patches * s.mergers * (5 if s.family == "qwen2_5_vl" else 4) * s.vision_width * e
    elif s.is_first:
        merger = patches * s.mergers * 4 * s.vision_width * e
    kept = decoder + vision + merger
    if not s.recompute:
        return s.in_flight * kept
    # the vision tower's backward comes last: by then the decoder's part of this micro-batch is gone
    return (s.in_flight - 1) * kept + max(kept + tokens * layer, vision + patches * block * s.vision_is_trained)


def _layer_bytes(s: StageSizes) -> float:
    """Bytes that one decoder layer keeps for each token."""
    d, e, t = s.dims, s.itemsize, s.tp_size
    queries, keys = d.num_heads * d.head_dim / t, d.num_kv_heads * d.kv_copies(t) * d.head_dim / t
    norms = 2 * d.hidden_size * (4 + 2 * e)  # fp32 input, normalised, times the weight
    attention = 3 * (queries + keys) * e  # as projected, rotated, and the result (keys: and values)
    head_norms = (queries + keys) * (e + (4 if e < 4 else 0)) if d.qk_norm else 0
    return norms + attention + head_norms + 4 * d.intermediate_size / t * e


def _vision_block_bytes(s: StageSizes) -> float:
    """Bytes that one vision block keeps for each patch."""
    widths, ffn_widths, norms = _VISION_BLOCK[s.family]
    wider = norms * s.vision_width * (4 - s.itemsize)  # RMS norms keep their input in fp32
    return s.itemsize * (widths * s.vision_width + ffn_widths * s.vision_ffn) + wider
