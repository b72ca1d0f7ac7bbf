"""Greedy evaluation of the trained weights on held-out shards, each rank a part, every sample once."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Callable, Sequence

from megavg.data.shards import iterate_all
from megavg.evaluation.draw import draw_boxes, panel
from megavg.evaluation.grounding import GroundingScores
from megavg.parallel.context import ParallelContext
from megavg.protocols.options import SamplingParams
from megavg.protocols.sample import Completion, Sample
from megavg.rollout.base import Generator
from megavg.trainer.bad_data import BadData, told_to_all
from megavg.trainer.policy import Policy
from megavg.trainer.rollouts import Rollouts, completions, encode


class Evaluator:
    """Answers every sample of a set greedily and measures the boxes with the reward's own parser and frame.

    Args:
        question: expression -> the text that goes with the image.
        limit: at most so many samples of a set; 0 takes all.
        num_pictures: answers drawn in the picture of a set.
    """

    def __init__(self, policy: Policy, context: ParallelContext, question: Callable[[str], str], max_new_tokens: int,
                 batch_size: int, limit: int = 0, num_pictures: int = 12, on_error: str = "raise",
                 max_skipped: int = 100):
        self.policy, self.context, self.question = policy, context, question
        self.params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        self.batch_size, self.limit, self.num_pictures = batch_size, limit, num_pictures
        self.on_error, self.max_skipped = on_error, max_skipped

    def run(self, name: str, shards: Sequence[str]):
        """Evaluate one set; all ranks call it. Returns (result, rows, picture), the picture on data rank 0 only."""
        generator = self.policy.sync()
        skipped: Counter = Counter()
        rank, num_ranks = self.context.dp_rank, self.context.dp_size
        samples = iterate_all(list(shards), self.on_error, self.max_skipped, skipped, rank, num_ranks)
        if self.limit:
            samples = islice(samples, len(range(rank, self.limit, num_ranks)))
        rows, tiles = [], []
        with told_to_all(self.context):
            while batch := list(islice(samples, self.batch_size)):
                for sample, completion in zip(batch, self._answers(batch, generator)):
                    rows.append(GroundingScores().add(sample, completion))
                    if len(tiles) < self.num_pictures and self.context.dp_rank == 0:
                        tiles.append(answer_tile(sample, rows[-1]))
        scores = GroundingScores(self.context.gather_rows(rows))
        if not scores.rows:
            raise BadData(f"evaluation set {name}: {list(shards)} hold no usable sample; skipped: {dict(skipped)}")
        result = scores.result() | {"skipped": sum(skipped.values())}
        picture = panel(tiles, 4, f"{name}: Acc@0.5 {result['acc_at_50']:.1%}, mean IoU {result['mean_iou']:.3f}") \
            if tiles else None
        return result, scores.rows, picture

    def _answers(self, batch: list[Sample], generator: Generator) -> list[Completion]:
        prompts = encode(batch, self.policy.processor, self.question)
        generation = generator.generate(prompts, 1, self.params, [sample.key for sample in batch])
        rollouts = Rollouts(batch, prompts, generation.responses, generation.truncated, group_size=1)
        return completions(rollouts, self.policy.processor)


def answer_tile(sample: Sample, row: dict):
    """One answer drawn on its picture; large pictures get larger tiles."""
    scale = 224 if max(sample.width, sample.height) <= 320 else 400
    return draw_boxes(sample.image, row["true_boxes_px"], row["predicted_boxes_px"], row["expression"], scale)
