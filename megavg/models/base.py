"""A model family behind one description, and the parts that all Qwen-VL families share.

The folder is the registry: ``model_type`` in a checkpoint's config.json names the module here whose ``SPEC`` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import nn

from megavg.checkpoint.hf import HFCheckpoint
from megavg.checkpoint.saved import SavedCheckpoint, open_checkpoint
from megavg.checkpoint.weight_map import WeightEntry, WeightMap
from megavg.models.layers.language_model import DecoderDims
from megavg.models.layers.stage import QwenVLStage
from megavg.models.stage_split import stage_layers
from megavg.parallel.context import ParallelContext
from megavg.protocols.life import goes_on
from megavg.protocols.options import StageOptions
from megavg.protocols.plugin import load_module, names_in, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """What one family adds to the shared stage.

    Attributes:
        family: HF's ``model_type``.
        box_format: how its answers write boxes (``megavg.ops.box_text``).
        qkv_bias, qk_norm: traits of its attention.
        make_rotary: text configuration -> HF's rotary module.
        make_vision_tower: vision configuration -> HF's vision tower.
        vision_features: (tower, pixel_values, grid) -> (features [M, D], deepstack list of [M, D]).
    """

    family: str
    box_format: str
    qkv_bias: bool
    qk_norm: bool
    make_rotary: Callable[[Any], nn.Module]
    make_vision_tower: Callable[[Any], nn.Module]
    vision_features: Callable[..., tuple[torch.Tensor, list[torch.Tensor]]]


@dataclass(frozen=True)
class Model:
    """A checkpoint's family and configuration; builds stages and knows their weights.

    Attributes:
        spec: the family.
        config: HF's configuration object of the checkpoint.
        dims: decoder sizes.
        checkpoint: the directory's tensors.
        options: how stages are built and run.
    """

    spec: ModelSpec
    config: Any
    dims: DecoderDims
    checkpoint: HFCheckpoint | SavedCheckpoint
    options: StageOptions = StageOptions()

    def build_stage(self, context: ParallelContext, dtype: torch.dtype) -> QwenVLStage:
        """This rank's stage on its device, with weights not loaded yet."""
        self.dims.check(context.tp_size)
        if self.options.sequence_parallel:
            check_sequence_parallel(context)
        layers = self.stage_layers(context.pp_size)[context.pp_rank]
        with torch.device(context.device):
            stage = QwenVLStage(self.dims, layers, self.config.image_token_id,
                                self.spec.make_rotary(self.config.text_config), lambda: self._vision_tower(dtype),
                                self.spec.vision_features, context, dtype, self.options)
        self._freeze(stage)
        for parameter in stage.parameters():
            if not getattr(parameter, "tensor_model_parallel", False) and not hasattr(parameter, "model_parallel"):
                # DeepSpeed's gradient norm counts a replicated parameter once
                parameter.model_parallel = context.tp_rank == 0
        if stage.tied_copy is not None and not stage.has_embedding:
            # ... and the two copies of a tied matrix too
            stage.tied_copy.tensor_model_parallel = stage.tied_copy.model_parallel = False
        return stage

    def check_weights(self) -> None:
        """Refuse a checkpoint that lacks a tensor of the whole model, also on ranks that would not read it.

        Raises:
            ValueError: on every rank alike.
        """
        missing = sorted(set(self.weight_map(1).hf_names) - set(self.checkpoint.names))
        if missing:
            raise ValueError(f"tensor {missing[0]} is missing in {self.checkpoint.directory}, {len(missing)} in all; "
                             "the checkpoint is incomplete or of another model than its config.json says")

    def stage_layers(self, pp_size: int) -> list[range]:
        """The decoder layers of every pipeline stage."""
        if pp_size == 1 and not self.options.pipeline_layers:
            return [range(self.dims.num_layers)]
        with torch.device("meta"):
            tower = self._vision_tower(torch.float32)
        return stage_layers(self.dims, self.config.vision_config, tower, pp_size, self.options)

    def _freeze(self, stage: QwenVLStage) -> None:
        if not stage.has_embedding:
            return
        if self.options.freeze_vision_tower:
            projector = {p for module in stage.projectors for p in module.parameters()}
            for parameter in set(stage.visual.parameters()) - projector:
                parameter.requires_grad_(False)
        if self.options.freeze_projector:
            for module in stage.projectors:
                module.requires_grad_(False)

    def _vision_tower(self, dtype: torch.dtype) -> nn.Module:
        from transformers.initialization import no_init_weights

        with no_init_weights():
            tower = self.spec.make_vision_tower(self.config.vision_config)
        for parameter in tower.parameters():  # buffers hold rotary frequencies, which stay fp32
            parameter.data = parameter.data.to(dtype)
        return tower

    def weight_map(self, tp_size: int) -> WeightMap:
        """Every parameter of the whole model and the HF tensors it is made of.

        A tied model has an entry for the copy of the embedding that the last of several stages uses as its head.
        """
        with torch.device("meta"):
            names = [name for name, _ in self._vision_tower(torch.float32).named_parameters()]
        return WeightMap([WeightEntry(f"visual.{name}", (f"model.visual.{name}",)) for name in names]
                         + _decoder_entries(self.dims, tp_size))

    def hf_weights(self, stage: QwenVLStage, context: ParallelContext) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's shard of every parameter of ``stage``, read from the checkpoint one at a time."""
        weight_map = self.weight_map(context.tp_size)
        for name, _ in stage.named_parameters():
            entry = weight_map[name]
            tensors = [self.checkpoint.read(hf_name) for hf_name in entry.hf_names]
            yield name, entry.to_megavg(tensors, context.tp_size, context.tp_rank)


def check_sequence_parallel(context: ParallelContext) -> None:
    """Refuse sequence parallelism where megatron-core has none."""
    if context.device.type != "cuda":
        raise ValueError("parallel.sequence_parallel=true needs a GPU: megatron-core's mappings are for CUDA only; set "
                         "it to false, which gives the same results")


def _family(model_type: str, directory: Path) -> ModelSpec:
    known = [name for name in names_in("megavg.models") if name.startswith("qwen")]
    if model_type not in known:
        raise ValueError(f"model_type={model_type!r} in {directory}/config.json is no family of megavg"
                         f"{nearest(model_type, known)}")
    return load_module("megavg.models", model_type, "model_type").SPEC


def load_model(directory: str | Path, options: StageOptions = StageOptions()) -> Model:
    """Open a checkpoint directory and pick its family by ``model_type``."""
    from transformers import AutoConfig

    checkpoint = open_checkpoint(directory)
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    spec = _family(config.model_type, checkpoint.directory)
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dims = DecoderDims(
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
        text.num_key_value_heads, head_dim, text.vocab_size, text.rms_norm_eps, spec.qkv_bias, spec.qk_norm,
        tie_embeddings=bool(config.tie_word_embeddings))
    return Model(spec, config, dims, checkpoint, options)


def copy_weights(stage: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Fill a stage that is not partitioned; every parameter must be given once, with its shape."""
    parameters = dict(stage.named_parameters())
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in weights:
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name}: expected shape {tuple(parameters[name].shape)}, got {tuple(tensor.shape)}; "
                                 "config.json and the weights do not belong together")
            parameters[name].copy_(tensor)
            goes_on()
            missing.discard(name)
    if missing:
        raise ValueError(f"no weights were given for {', '.join(sorted(missing)[:3])} and {len(missing)} in all")


def _decoder_entries(dims: DecoderDims, tp_size: int) -> list[WeightEntry]:
    text = "model.language_model."
    padded = dims.padded_vocab_size(tp_size)
    padding = padded if padded != dims.vocab_size else None
    embedding = f"{text}embed_tokens.weight"
    head = embedding if dims.tie_embeddings else "lm_head.weight"
    entries = [WeightEntry("embedding.weight", (embedding,), 0, (dims.vocab_size,), padding),
               WeightEntry("final_norm.weight", (f"{text}norm.weight",)),
               WeightEntry("head.weight", (head,), 0, (dims.vocab_size,), padding)]
    query, key = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    copies = dims.kv_copies(tp_size)
    for i in range(dims.num_layers):
        ours, theirs = f"layers.{i}.", f"{text}layers.{i}."
        for kind in ("weight", "bias") if dims.qkv_bias else ("weight",):
            q, k, v = (f"{theirs}self_attn.{n}_proj.{kind}" for n in "qkv")
            if copies == 1:
                entries.append(WeightEntry(f"{ours}attention.qkv.{kind}", (q, k, v), 0, (query, key, key)))
            else:
                entries += [WeightEntry(f"{ours}attention.qkv.{kind}", (q,), 0, (query,)),
                            WeightEntry(f"{ours}attention.kv.{kind}", (k, v), 0, (key, key), copies=copies)]
        if dims.qk_norm:
            entries += [WeightEntry(f"{ours}attention.query_norm.weight", (f"{theirs}self_attn.q_norm.weight",)),
                        WeightEntry(f"{ours}attention.key_norm.weight", (f"{theirs}self_attn.k_norm.weight",))]
        gate_up = tuple(f"{theirs}mlp.{n}_proj.weight" for n in ("gate", "up"))
        entries += [
            WeightEntry(f"{ours}attention.out.weight", (f"{theirs}self_attn.o_proj.weight",), 1, (query,)),
            WeightEntry(f"{ours}feed_forward.gate_up.weight", gate_up, 0, (dims.intermediate_size,) * 2),
            WeightEntry(f"{ours}feed_forward.down.weight", (f"{theirs}mlp.down_proj.weight",), 1,
                        (dims.intermediate_size,)),
            WeightEntry(f"{ours}input_norm.weight", (f"{theirs}input_layernorm.weight",)),
            WeightEntry(f"{ours}post_norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
        ]
    return entries
