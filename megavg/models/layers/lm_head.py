"""The language-model head: this rank's rows of the vocabulary, read only through the vocabulary op."""

from __future__ import annotations

import torch
from torch import nn

from megavg.ops.vocab_pair import pair_divergence
from megavg.ops.vocab_parallel import token_scores
from megavg.ops.vocab_shard import VocabShard
from megavg.ops.vocab_torch import project
from megavg.parallel.context import ParallelContext
from megavg.parallel.core import tensor_parallel
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

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float,
                paired: bool = False) -> tuple[torch.Tensor, ...]:
        """hidden [N, D], targets [N] -> (log-probs [N], entropies [N]), equal on all tensor-parallel ranks.

        With ``paired`` the rows are n of P and then n of Q, with the same targets: (log P, H(P), log Q, H(Q), JSD,
        KL(P || Q)), each [n], all but JSD without a gradient.
        """
        if paired:
            return self._pair_scores(hidden, targets, temperature)
        scores = token_scores(hidden, self.weight, targets, self.shard, temperature, options=self.options)
        if scores.dropped_mass is not None and self.weight.requires_grad:  # else it is no update's backward
            self.dropped_mass = self.dropped_mass.to(hidden.device) + scores.dropped_mass.sum()
        return scores.logprobs, scores.entropy

    def _pair_scores(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
        n = len(targets) // 2
        if not torch.equal(targets[:n], targets[n:]):
            raise ValueError("the rows on perturbed images must have the answers of those on clean ones, in the same "
                             "order")
        pair = pair_divergence(hidden[:n], hidden[n:], self.weight, self.shard, temperature, targets=targets[:n])
        return pair.logprobs_p, pair.entropy_p, pair.logprobs_q, pair.entropy_q, pair.jsd, pair.kl

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> this rank's logits [N, Vs], fp32; for the few positions that are sampled."""
        return project(hidden, self.weight, torch.float32)
