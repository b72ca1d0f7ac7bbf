"""Figures of one optimiser batch, over all ranks, and the time and memory of its phases."""

from __future__ import annotations

import resource
import sys
import time

import torch
import torch.distributed as dist

from megavg.parallel.context import ParallelContext
from megavg.protocols.batch import RolloutBatch, TokenScores
from megavg.trainer.rollouts import Judgement, Rollouts


class PhaseClock:
    """Seconds and, on CUDA, peak memory of each phase of a step; on CUDA the work of a phase is waited for."""

    def __init__(self, device: torch.device):
        self.device, self._on_gpu = device, device.type == "cuda"
        self.laps: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes of the device that tensors took, by phase
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.laps, self.peaks, self._last = {}, {}, time.monotonic()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def lap(self, phase: str) -> None:
        """End ``phase``, which began at the last lap; of those of one name times add up, the largest peak stays."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.monotonic()
        self.laps[f"time/{phase}"] = self.laps.get(f"time/{phase}", 0.0) + now - self._last
        self._last = now

    def memory(self, context: ParallelContext) -> dict[str, float]:
        """Peak memory in GB (1e9 bytes) of the rank that took most; all ranks call it, one maximum over the ranks.

        On CUDA ``memory/peak_gb`` is what tensors took in this step's laps, ``memory/<phase>_gb`` in each of them,
        ``memory/reserved_gb`` what the allocator holds now, and ``memory/host_gb`` the process' resident memory at its
        peak since it started; on a CPU ``memory/peak_gb`` is the latter.
        """
        if not self._on_gpu:
            found = {"memory/peak_gb": _host_peak()}
        else:
            found = {"memory/peak_gb": max(self.peaks.values(), default=0),
                     **{f"memory/{phase}_gb": peak for phase, peak in self.peaks.items()},
                     "memory/reserved_gb": torch.cuda.memory_reserved(self.device), "memory/host_gb": _host_peak()}
        largest = torch.tensor(list(found.values()), dtype=torch.int64, device=self.device)
        if context.world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return {name: size / 1e9 for name, size in zip(found, largest.tolist())}

    def tensor(self, value: float) -> torch.Tensor:
        """A number where a collective can take it."""
        return torch.tensor(float(value), device=self.device)


def _host_peak() -> int:
    """Bytes of memory that this process had at most since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # there bytes, elsewhere KiB


def batch_metrics(batch: RolloutBatch, stats: TokenScores | None, entropy_sum: torch.Tensor,
                  reference_logprobs: torch.Tensor | None) -> dict[str, float]:
    """Entropy, self-information, KL and lengths over the whole optimiser batch.

    ``entropy_sum`` is that of this data-parallel rank's tokens. ``entropy/mean`` is the mean token entropy in nats
    under the policy being updated, ``kl/reference`` the mean k3 estimate of the KL of the behaviour policy to the
    reference, in nats per token.
    """
    mask = batch.mask
    sums = [mask.sum().float(), torch.tensor(float(mask.shape[0]), device=mask.device), entropy_sum]
    if stats is not None:
        sums += [(-stats.logprobs * mask).sum()]
    if reference_logprobs is not None:
        difference = (reference_logprobs - stats.logprobs) * mask
        sums += [(difference.exp() - difference - 1).sum()]
    total = batch.all_sum(torch.stack([value.float() for value in sums]))
    metrics = {"entropy/mean": float(total[2] / total[0]), "response/length": float(total[0] / total[1])}
    if stats is not None:
        metrics["entropy/self_information"] = float(total[3] / total[0])
    if reference_logprobs is not None:
        metrics["kl/reference"] = float(total[4] / total[0])
    return metrics


def rollout_metrics(batch: RolloutBatch, stats: TokenScores, rollouts: Rollouts,
                    context: ParallelContext) -> dict[str, float]:
    """``rollout/logprob_gap``: the largest difference between log-probs reported while sampling and the scorer's.

    Far above 1e-4 in fp32 means that generation and training disagree. Answers to another image than the one they are
    scored on do not count. ``data/noisy``: share of answers whose sample says that its label is noise.
    """
    on_clean = torch.tensor(rollouts.on_clean, device=batch.mask.device)[:, None]
    gap = (stats.logprobs - rollouts.sampling_logprobs.to(stats.logprobs)).abs() * (batch.mask & on_clean)
    noisy = 0.0 if batch.noisy is None else float(batch.noisy.float().mean())
    parts = context.gather_rows([(float(gap.max()), noisy)])
    metrics = {"rollout/logprob_gap": max(part[0] for part in parts)}
    return metrics if batch.noisy is None else metrics | {"data/noisy": sum(part[1] for part in parts) / len(parts)}


def judgement_metrics(judgement: Judgement, context: ParallelContext) -> dict:
    """Mean rewards, IoU and the share that parses, and the reasons for the rewards, over all ranks.

    ``reward/<name>`` is the mean over the answers that this reward judged, which its ``tasks`` may restrict; a reward
    that judged none of this batch has none.
    """
    parts = context.gather_rows([{
        "count": len(judgement.rewards), "reward": sum(judgement.rewards),
        "iou": sum(row["iou"] for row in judgement.rows), "parsed": sum(row["parsed"] for row in judgement.rows),
        "terms": judgement.term_totals,
        "reasons": dict(judgement.reasons)}])
    count = sum(part["count"] for part in parts)
    reasons: dict[str, int] = {}
    terms: dict[str, tuple[float, int]] = {}
    for part in parts:
        for reason, number in part["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + number
        for name, (total, judged) in part["terms"].items():
            before = terms.get(name, (0.0, 0))
            terms[name] = before[0] + total, before[1] + judged
    return {
        "reward/mean": sum(part["reward"] for part in parts) / count,
        "iou/mean": sum(part["iou"] for part in parts) / count,
        "reward/parse_rate": sum(part["parsed"] for part in parts) / count,
        **{f"reward/{name}": total / judged for name, (total, judged) in terms.items() if judged},
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
    }
