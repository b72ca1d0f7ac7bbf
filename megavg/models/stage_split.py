"""Which decoder layers each pipeline stage holds: contiguous, the slowest stage as fast as can be."""

from __future__ import annotations

from typing import Any

from torch import nn

from megavg.models.layers.language_model import DecoderDims
from megavg.protocols.options import StageOptions

_SCORED_SHARE = 0.2
"""Share of tokens that go through the head: answers, as against prompts."""
_HEAD_PRODUCTS = 4 / 3
"""The head's backward works its logits out again, so it costs four products where a layer costs three."""


def split_layers(costs: list[float], num_stages: int, first: float = 0.0, last: float = 0.0,
                 least_first: int = 1) -> list[range]:
    """Cut ``costs`` into contiguous non-empty ranges whose largest sum is the smallest possible, and even beside that.

    Args:
        costs: of each layer.
        first, last: what the first and the last stage carry beside layers.
        least_first: layers that the first stage must hold at least.

    Raises:
        ValueError: there are too few layers.
    """
    if len(costs) < least_first + num_stages - 1:
        raise ValueError(f"{len(costs)} layers cannot be divided into {num_stages} stages of which the first holds "
                         f"{least_first} or more")
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    # the largest stage first; then, among the ways that stay below it, the smallest sum of squares
    worst, _ = _best_ends(costs, extra, least_first, lambda cost: cost, max)
    limit = worst * (1 + 1e-9)
    _, ends = _best_ends(costs, extra, least_first, lambda cost: cost**2 if cost <= limit else float("inf"),
                         lambda a, b: a + b)
    return [range(start, stop) for start, stop in zip([0, *ends], ends)]


def _best_ends(costs, extra, least_first: int, price, join) -> tuple[float, list[int]]:
    """(value, ends of the parts) with the smallest ``join`` of the parts' ``price``, by dynamic programming."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {n: (price(sums[n] + extra[0]), [n]) for n in range(least_first, len(costs) + 1)}
    for more in extra[1:]:
        best = {n: min(((join(value, price(sums[n] - sums[m] + more)), [*ends, n])
                        for m, (value, ends) in best.items() if m < n), key=lambda option: option[0])
                for n in range(min(best) + 1, len(costs) + 1)}
    return best[len(costs)]


def stage_layers(dims: DecoderDims, vision_config: Any, vision_tower: nn.Module, num_stages: int,
                 options: StageOptions) -> list[range]:
    """The layers of every stage, from the options or by cost per token.

    A cost is the number of weights that a token is multiplied with; ``vision_tower`` may lie on the meta device.

    Raises:
        ValueError: the options do not fit the model, or deepstack features would enter a later stage.
    """
    num_added = len(getattr(vision_config, "deepstack_visual_indexes", None) or ())
    least_first = max(1, num_added)
    if options.pipeline_layers:
        stages = _given(options.pipeline_layers, dims.num_layers, num_stages)
        if len(stages[0]) < num_added and num_stages > 1:
            raise ValueError(f"parallel.pipeline_layers gives the first stage {len(stages[0])} layers, but deepstack "
                             f"features enter the first {num_added}; give it more")
        return stages
    if dims.num_layers < least_first + num_stages - 1:
        raise ValueError(f"{dims.num_layers} decoder layers do not fill parallel.pipeline_model_parallel_size="
                         f"{num_stages} stages" + (f" of which the first holds the {num_added} that deepstack features "
                                                   "enter" if num_added else "") + "; lower it")
    layer = float(dims.layer_numel)
    vision = sum(p.numel() for p in vision_tower.parameters()) * vision_config.spatial_merge_size**2
    if options.freeze_vision_tower:
        vision /= 3  # it has no backward
    head = dims.vocab_size * dims.hidden_size * _SCORED_SHARE * _HEAD_PRODUCTS
    return split_layers([layer] * dims.num_layers, num_stages, vision * options.image_token_share, head, least_first)


def _given(counts: tuple[int, ...], num_layers: int, num_stages: int) -> list[range]:
    if len(counts) != num_stages or sum(counts) != num_layers:
        raise ValueError(f"parallel.pipeline_layers={list(counts)} must be {num_stages} numbers, one a stage, that sum "
                         f"to the model's {num_layers} layers")
    ends = [sum(counts[:i + 1]) for i in range(len(counts))]
    return [range(start, stop) for start, stop in zip([0, *ends], ends)]
