"""The language-model head: this rank's rows of the vocabulary, read only through the vocabulary op."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import nn

from megavg.ops.vocab_parallel import token_scores
from megavg.ops.vocab_shard import VocabShard
from megavg.ops.vocab_torch import project
from megavg.parallel.context import ParallelContext
from megavg.protocols.options import HeadOptions


class LMHead(nn.Module):
    """Scores target tokens and, for sampling, gives the logits of single positions.

    ``tied`` is the embedding's parameter where the model ties them; it is shared, not copied. ``dropped_mass`` sums up
    the probability that backwards leave out where ``options.skip_mass`` lets them, over this rank's rows of the
    vocabulary.
    """

    def __init__(self, hidden_size: int, vocab_size: int, padded_vocab_size: int, context: ParallelContext,
                 dtype: torch.dtype, options: HeadOptions = HeadOptions(), tied: nn.Parameter | None = None):
        super().__init__()
        self.options = options
        self.dropped_mass = torch.zeros((), dtype=torch.float64)
        rows = padded_vocab_size // context.tp_size
        start = context.tp_rank * rows
        self.shard = VocabShard(start, start + rows, vocab_size, context.tp_group if context.tp_size > 1 else None)
        if tied is None:
            tied = nn.Parameter(torch.zeros(rows, hidden_size, dtype=dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(tied, True, 0, 1)
        self.weight = tied

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float):
        """hidden [N, D], targets [N] -> (log-probs [N], entropies [N]), equal on all tensor-parallel ranks."""
        scores = token_scores(hidden, self.weight, targets, self.shard, temperature, options=self.options)
        if scores.dropped_mass is not None:
            self.dropped_mass = self.dropped_mass.to(hidden.device) + scores.dropped_mass.sum()
        return scores.logprobs, scores.entropy

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> this rank's logits [N, Vs], fp32; for the few positions that are sampled."""
        return project(hidden, self.weight, torch.float32)
