"""One pipeline stage of a Qwen-VL model: with one stage it is the whole model."""

from __future__ import annotations

import itertools
from typing import Callable, Sequence

import torch
from torch import nn

from megavg.models.layers.language_model import (Attend, DecoderDims, DecoderLayer, causal_attention, packed_attention,
                                                 zeros_)
from megavg.models.layers.lm_head import LMHead
from megavg.models.layers.norm import RMSNorm
from megavg.models.layers.recompute import recompute_in_backward
from megavg.parallel.context import ParallelContext
from megavg.parallel.core import tensor_parallel
from megavg.parallel.mcore import layer_config
from megavg.parallel.tensor import padded_rows
from megavg.protocols.batch import IGNORE
from megavg.protocols.options import StageOptions

VisionFeatures = tuple[torch.Tensor, list[torch.Tensor]]


class QwenVLStage(nn.Module):
    """Embedding and vision tower on the first stage, decoder layers on each, norm and head on the last.

    Parameter names hold the layer's number in the whole model, so they are the same in every layout.

    Args:
        dims: sizes of the decoder.
        layers: the decoder layers of this stage.
        image_token_id: the token that image features replace.
        rotary: HF's rotary module of the family, (x, positions [3, B, S]) -> cos, sin [B, S, d].
        make_vision_tower: builds HF's vision tower; called on the first stage only.
        vision_features: (tower, pixel_values, grid) -> features [M, D] and the deepstack's list of [M, D].
        options: recomputation, sequence parallelism and the head's.
    """

    def __init__(self, dims: DecoderDims, layers: range, image_token_id: int, rotary: nn.Module,
                 make_vision_tower: Callable[[], nn.Module], vision_features: Callable[..., VisionFeatures],
                 context: ParallelContext, dtype: torch.dtype, options: StageOptions = StageOptions()):
        super().__init__()
        self.image_token_id, self.vision_features = image_token_id, vision_features
        self.has_embedding, self.has_head = context.is_first_stage, context.is_last_stage
        self.hidden_size, self.tp_size = dims.hidden_size, context.tp_size
        self.sequence_parallel = options.sequence_parallel and context.tp_size > 1
        self.rotary = rotary
        padded = dims.padded_vocab_size(context.tp_size)
        if self.has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                padded, dims.hidden_size, init_method=zeros_, config=layer_config(context, dtype))
            self.visual = make_vision_tower()
        self.layers = nn.ModuleDict({str(i): DecoderLayer(i, dims, context, dtype, self.sequence_parallel)
                                     for i in layers})
        if options.recompute:
            for block in itertools.chain(*self.chains):
                recompute_in_backward(block)
        if self.has_head:
            tied = self.embedding.weight if dims.tie_embeddings and self.has_embedding else None
            self.final_norm = RMSNorm(dims.hidden_size, dims.norm_eps, dtype, sees_part=self.sequence_parallel)
            self.head = LMHead(dims.hidden_size, dims.vocab_size, padded, context, dtype, options.head, tied)
        # the first and the last stage hold a copy each of the matrix that they tie
        self.tied_copy: nn.Parameter | None = None
        if dims.tie_embeddings and context.pp_size > 1 and (self.has_embedding or self.has_head):
            self.__dict__["tied_copy"] = self.embedding.weight if self.has_embedding else self.head.weight

    @property
    def chains(self) -> list[list[nn.Module]]:
        """Repeated parts that run one after the other: vision blocks, and decoder layers."""
        return [list(self.visual.blocks) if self.has_embedding else [], list(self.layers.values())]

    @property
    def projectors(self) -> list[nn.Module]:
        """What maps vision features to the decoder's width."""
        if not self.has_embedding:
            return []
        return [self.visual.merger, *getattr(self.visual, "deepstack_merger_list", ())]

    @property
    def blocks(self) -> list[nn.Module]:
        """What ZeRO-3 gathers and releases as one piece each.

        DeepSpeed takes the gradients of such a piece when the gradient of its input is there. A trained projector
        behind a frozen vision tower has no such input, so it is gathered module by module.
        """
        vision, layers = self.chains
        is_cut_off = _is_trained(self.projectors) and not _is_trained(vision)
        return [*vision, *([] if is_cut_off else self.projectors), *layers]

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor,
              feature_index: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token embeddings with image features in place, and the deepstack's additions: ([B, S, D], [[B, S, D]]).

        Features that no token asks for (those of a dummy image) are computed and left out; their gradient is zero.
        """
        x = self.embedding(input_ids)
        is_image = (input_ids == self.image_token_id)[..., None]
        if int(is_image.sum()) != feature_index.shape[0]:
            raise ValueError(f"{int(is_image.sum())} image tokens in the batch but {feature_index.shape[0]} are "
                             "expected; the processor and the model disagree on the image token")
        features, deepstack = self.vision_features(self.visual, pixel_values, image_grid_thw)
        features, *deepstack = (f[feature_index].to(x.dtype) for f in (features, *deepstack))
        x = x.masked_scatter(is_image, features)
        return x, [torch.zeros_like(x).masked_scatter(is_image, extra) for extra in deepstack]

    def hidden_shape(self, input_ids: torch.Tensor) -> tuple[int, ...]:
        """Shape of the hidden states between stages for ``input_ids`` [B, S]: [B, S, D], or this rank's rows [n, D]."""
        if self.sequence_parallel:
            return -(-input_ids.numel() // self.tp_size), self.hidden_size
        return *input_ids.shape, self.hidden_size

    def decode(self, x: torch.Tensor, position_ids: torch.Tensor, attend: Attend = causal_attention,
               deepstack: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """This stage's decoder layers, and the final norm where this is the last.

        ``x`` is [B, S, D] on the first stage and ``hidden_shape`` elsewhere; so is what comes back, but the last stage
        gives [B, S, D].
        """
        cos, sin = self.rotary(x, position_ids)
        if self.sequence_parallel and self.has_embedding:
            x, *deepstack = (self._scatter(t) for t in (x, *deepstack))
        for name, layer in self.layers.items():
            x = layer(x, cos, sin, attend)
            if int(name) < len(deepstack):
                x = x + deepstack[int(name)]
        if not self.has_head:
            return x
        x = self.final_norm(x)
        return self._gather(x, position_ids.shape[1:]) if self.sequence_parallel else x

    def forward(self, input_ids, position_ids, target_ids, pixel_values, image_grid_thw, feature_index,
                row_lengths=None, hidden=None, temperature: float = 1.0, paired: bool = False):
        """One micro-batch (fields of ``ModelInputs``).

        Returns the hidden states (``hidden_shape``) on all but the last stage; there (log-probs, entropies), each [N],
        of the positions whose target is not IGNORE, in row order. With ``paired`` the second half of the rows holds the
        same answers on perturbed images: (log P, H(P), log Q, H(Q), JSD, KL(P || Q)), each [N / 2], P being the first
        half's distributions and Q the second's.
        """
        deepstack = []
        if self.has_embedding:
            hidden, deepstack = self.embed(input_ids, pixel_values, image_grid_thw, feature_index)
        attend = causal_attention if row_lengths is None else packed_attention(row_lengths)
        hidden = self.decode(hidden, position_ids, attend, deepstack)
        if not self.has_head:
            return hidden
        scored = target_ids != IGNORE
        return self.head(hidden[scored], target_ids[scored], temperature, paired)

    def _scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D], equal on all tensor-parallel ranks -> this rank's rows [n, D]."""
        return tensor_parallel.scatter_to_sequence_parallel_region(padded_rows(x.flatten(0, 1), self.tp_size))

    def _gather(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of ``_scatter``; the head gives every rank the whole gradient, of which each keeps its rows."""
        x = tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        return x[:shape[0] * shape[1]].view(*shape, -1)


def _is_trained(modules: Sequence[nn.Module]) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
