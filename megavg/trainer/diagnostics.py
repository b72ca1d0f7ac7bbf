"""Look at single tokens: figures and histograms by kind of token, and pages that colour each token of an answer."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import torch

from megavg.evaluation.heat_map import heat_map_html
from megavg.evaluation.worst import answer_tile
from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores
from megavg.trainer.rollouts import Judgement, Rollouts
from megavg.trainer.run_log import RunLog
from megavg.trainer.token_kinds import NAMES, TokenKinds

if TYPE_CHECKING:
    from PIL.Image import Image


def diagnose(log: RunLog, step: int, rollouts: Rollouts, batch: RolloutBatch, stats: TokenScores | None,
             signal: PolicySignal, judgement: Judgement | None, reader: TokenKinds) -> None:
    """Write the histograms and the heat maps of one step; all ranks call it, one of them writes."""
    log.histograms(step, histograms(batch, stats, signal))
    if log.is_writer:
        log.page(step, "heat_maps", token_page(f"Answers at step {step}", rollouts, batch, stats, signal, judgement,
                                               reader))


def kind_metrics(batch: RolloutBatch, stats: TokenScores | None, signal: PolicySignal) -> dict[str, float]:
    """Means over the tokens of each kind, over all ranks: ``<quantity>/<think, digits or format>``.

    ``entropy`` and ``self_information`` are of the behaviour policy, in nats, ``jsd`` is how far its distributions
    moved on the perturbed image, in nats, and ``selected`` the share of valid tokens whose weight is not 0. What was
    not scored, and a kind without a token, is left out. All ranks call it; one sum over the ranks.
    """
    values = _quantities(stats, signal) | {"selected": (signal.weights != 0).float()}
    for name in ("weight", "advantage"):  # signed or without a unit: their histograms say more than a mean
        values.pop(name)
    where = {kind: _tokens(batch, kind) for kind in NAMES}
    rows = [torch.stack([tokens.sum().double(), *(value[tokens].sum(dtype=torch.float64) for value in values.values())])
            for tokens in where.values()]
    total = batch.all_sum(torch.stack(rows)).tolist()
    return {f"{name}/{NAMES[kind]}": sums[i] / sums[0] for kind, sums in zip(where, total) if sums[0]
            for i, name in enumerate(values, 1)}


def histograms(batch: RolloutBatch, stats: TokenScores | None, signal: PolicySignal) -> dict[str, torch.Tensor]:
    """Values of all valid tokens, over all ranks, as 1-D CPU tensors: ``tokens/<quantity>/<all or a kind>``.

    Quantities are entropy, self_information and jsd, in nats, weight and advantage. All ranks call it.
    """
    kinds = batch.all_gather(_kinds(batch)[batch.mask].to(torch.int64))
    found = {}
    for name, value in _quantities(stats, signal).items():
        gathered = batch.all_gather(value[batch.mask].float())
        parts = {"all": gathered, **{NAMES[kind]: gathered[kinds == kind] for kind in NAMES}}
        found |= {f"tokens/{name}/{part}": values.cpu() for part, values in parts.items() if len(values)}
    return found


def token_page(heading: str, rollouts: Rollouts, batch: RolloutBatch, stats: TokenScores | None, signal: PolicySignal,
               judgement: Judgement | None, reader: TokenKinds, limit: int = 8) -> str:
    """One HTML page with ``limit`` of this rank's answers, their tokens coloured; no collective is called.

    The first answers to the prompts come before the second ones, and so on.
    """
    size, count = rollouts.group_size, len(rollouts.responses)
    chosen = sorted(sorted(range(count), key=lambda b: (b % size, b // size))[:limit])
    kinds, quantities = _kinds(batch), _quantities(stats, signal)
    answers = []
    for b in chosen:
        sample, tokens = rollouts.samples[b // size], rollouts.responses[b]
        valid = slice(0, len(tokens))
        answers.append({
            "title": sample.expression, "subtitle": f"{sample.key}, answer {b % size + 1} of {size}",
            "tokens": [reader.text(token) for token in tokens],
            "kinds": [NAMES[kind] for kind in kinds[b, valid].tolist()],
            "selected": (signal.weights[b, valid] != 0).tolist(),
            "values": {name: value[b, valid].tolist() for name, value in quantities.items()},
            "reward": judgement.rewards[b] if judgement else None,
            "image": _data_uri(answer_tile(sample, judgement.rows[b])) if judgement else None})
    return heat_map_html(answers, heading)


def _quantities(stats: TokenScores | None, signal: PolicySignal) -> dict[str, torch.Tensor]:
    """What there is to see of every token, by name; each [B, T]."""
    found = {}
    if stats is not None:
        found |= {"entropy": stats.entropy, "self_information": -stats.logprobs}
    found |= {"weight": signal.weights, "advantage": signal.advantages}
    if stats is not None and stats.perturbed is not None:
        found["jsd"] = stats.perturbed.jsd
    return {name: value.detach() for name, value in found.items()}


def _kinds(batch: RolloutBatch) -> torch.Tensor:
    if batch.token_kinds is None:
        raise ValueError("diagnostics need batch.token_kinds, which this batch lacks; fill it from TokenKinds")
    return batch.token_kinds


def _tokens(batch: RolloutBatch, kind: int) -> torch.Tensor:
    return batch.mask & (_kinds(batch) == kind)


def _data_uri(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
