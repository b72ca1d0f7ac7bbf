"""One pipeline stage of a Qwen-VL model: with one stage it is the whole model."""

from __future__ import annotations

from typing import Callable

import torch
from megatron.core import tensor_parallel
from torch import nn

from megavg.models.layers.language_model import Attend, DecoderDims, DecoderLayer, RMSNorm, causal_attention, zeros_
from megavg.models.layers.lm_head import LMHead
from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import layer_config
from megavg.protocols.batch import IGNORE
from megavg.protocols.options import HeadOptions

VisionFeatures = tuple[torch.Tensor, list[torch.Tensor]]


def layer_range(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """Decoder layers of one stage: contiguous, as even as they come."""
    return range(pp_rank * num_layers // pp_size, (pp_rank + 1) * num_layers // pp_size)


class QwenVLStage(nn.Module):
    """Embedding and vision tower on the first stage, decoder layers on each, norm and head on the last.

    Parameter names hold the layer's number in the whole model, so they are the same in every layout.

    Args:
        dims: sizes of the decoder.
        image_token_id: the token that image features replace.
        rotary: HF's rotary module of the family, (x, positions [3, B, S]) -> cos, sin [B, S, d].
        make_vision_tower: builds HF's vision tower; called on the first stage only.
        vision_features: (tower, pixel_values, grid) -> features [M, D] and the deepstack's list of [M, D].
    """

    def __init__(self, dims: DecoderDims, image_token_id: int, rotary: nn.Module,
                 make_vision_tower: Callable[[], nn.Module], vision_features: Callable[..., VisionFeatures],
                 context: ParallelContext, dtype: torch.dtype, head_options: HeadOptions = HeadOptions()):
        super().__init__()
        self.image_token_id, self.vision_features = image_token_id, vision_features
        self.has_embedding, self.has_head = context.is_first_stage, context.is_last_stage
        self.rotary = rotary
        padded = dims.padded_vocab_size(context.tp_size)
        if self.has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                padded, dims.hidden_size, init_method=zeros_, config=layer_config(context, dtype))
            self.visual = make_vision_tower()
        layers = layer_range(dims.num_layers, context.pp_size, context.pp_rank)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(i, dims, context, dtype) for i in layers})
        if self.has_head:
            tied = self.embedding.weight if dims.tie_embeddings and self.has_embedding else None
            self.final_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype)
            self.head = LMHead(dims.hidden_size, dims.vocab_size, padded, context, dtype, head_options, tied)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts: what ZeRO-3 gathers and releases as one piece each."""
        vision: list[nn.Module] = []
        if self.has_embedding:
            mergers = getattr(self.visual, "deepstack_merger_list", ())
            vision = [*self.visual.blocks, self.visual.merger, *mergers]
        return [*vision, *self.layers.values()]

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor,
              feature_index: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token embeddings with image features in place, and the deepstack's additions: ([B, S, D], [[B, S, D]])."""
        x = self.embedding(input_ids)
        is_image = (input_ids == self.image_token_id)[..., None]
        if int(is_image.sum()) != feature_index.shape[0]:
            raise ValueError(f"{int(is_image.sum())} image tokens in the batch but {feature_index.shape[0]} are "
                             "expected; the processor and the model disagree on the image token")
        features, deepstack = self.vision_features(self.visual, pixel_values, image_grid_thw)
        features, *deepstack = (f[feature_index].to(x.dtype) for f in (features, *deepstack))
        x = x.masked_scatter(is_image, features)
        return x, [torch.zeros_like(x).masked_scatter(is_image, extra) for extra in deepstack]

    def decode(self, x: torch.Tensor, position_ids: torch.Tensor, attend: Attend = causal_attention,
               deepstack: list[torch.Tensor] = ()) -> torch.Tensor:
        """This stage's decoder layers, and the final norm where this is the last: [B, S, D] -> [B, S, D]."""
        cos, sin = self.rotary(x, position_ids)
        for name, layer in self.layers.items():
            x = layer(x, cos, sin, attend)
            if int(name) < len(deepstack):
                x = x + deepstack[int(name)]
        return self.final_norm(x) if self.has_head else x

    def forward(self, input_ids, position_ids, target_ids, pixel_values, image_grid_thw, feature_index, hidden=None,
                temperature: float = 1.0):
        """One micro-batch (fields of ``ModelInputs``).

        Returns the hidden states [B, S, D] on all but the last stage; there (log-probs, entropies), each [N], of the
        positions whose target is not IGNORE, in row order.
        """
        deepstack = []
        if self.has_embedding:
            hidden, deepstack = self.embed(input_ids, pixel_values, image_grid_thw, feature_index)
        hidden = self.decode(hidden, position_ids, deepstack=deepstack)
        if not self.has_head:
            return hidden
        scored = target_ids != IGNORE
        return self.head(hidden[scored], target_ids[scored], temperature)
