"""Greedy answers to a set of samples, each rank a part, every sample once; and the evaluation during a training."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Callable, Iterator, Sequence

from megavg.evaluation.draw import panel
from megavg.evaluation.figures import AnswerScores, headline_text, in_stored_order
from megavg.evaluation.reader import SetReader
from megavg.evaluation.rows import answer_row
from megavg.evaluation.worst import answer_tile
from megavg.parallel.context import ParallelContext
from megavg.protocols.options import SamplingParams
from megavg.protocols.sample import Completion, Sample
from megavg.trainer.answering import LoadedModel
from megavg.trainer.bad_data import BadData, told_to_all
from megavg.trainer.policy import Policy
from megavg.trainer.rollouts import Rollouts, completions, encode


def greedy_answers(samples: Iterator[Sample], model: Policy | LoadedModel, question: Callable[[Sample], str],
                   max_new_tokens: int, batch_size: int) -> Iterator[list[tuple[Sample, Completion]]]:
    """Yield the samples with the model's most likely answers, ``batch_size`` at a time.

    Nothing here waits for another data-parallel rank, so that each may bring another number of samples; the ranks of
    one model bring the same.
    """
    generator, processor = model.sync(), model.processor
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    while batch := list(islice(samples, batch_size)):
        prompts = encode(batch, processor, question)
        generation = generator.generate(prompts, 1, params, [sample.key for sample in batch])
        rollouts = Rollouts(batch, prompts, generation.responses, generation.truncated, group_size=1)
        yield list(zip(batch, completions(rollouts, processor)))


def usable_samples(reader: SetReader, context: ParallelContext) -> tuple[list[Sample], Counter]:
    """(every sample of a set that was walked through, how many records were left out by reason), on all ranks alike.

    Raises:
        ValueError: more records were left out by all ranks together than ``max_skipped`` allows.
    """
    entries = set(context.gather_rows(reader.skipped_entries()))
    reasons = Counter(reason for *_, reason in entries)
    if len(entries) > reader.skips.max_skipped:
        raise ValueError(f"{len(entries)} records were skipped ({dict(reasons)}), more than max_skipped="
                         f"{reader.skips.max_skipped}; clean the shards, or raise max_skipped")
    left_out = reader.left_out(entries)
    return [sample for sample in reader.samples if (sample.shard, sample.key) not in left_out], reasons


class Evaluator:
    """Answers every sample of a set greedily and measures the answers with the reward's own parsers and frame.

    Args:
        question: sample -> the text that goes with the image.
        limit: at most so many samples of a set; 0 takes all.
        num_pictures: answers drawn in the picture of a set.
    """

    def __init__(self, policy: Policy, context: ParallelContext, question: Callable[[Sample], str],
                 max_new_tokens: int, batch_size: int, limit: int = 0, num_pictures: int = 12, on_error: str = "raise",
                 max_skipped: int = 100):
        self.policy, self.context, self.question = policy, context, question
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.limit, self.num_pictures = limit, num_pictures
        self.on_error, self.max_skipped = on_error, max_skipped

    def run(self, name: str, shards: Sequence[str]):
        """Evaluate one set; all ranks call it. Returns (result, rows, picture), the picture on data rank 0 only."""
        reader = SetReader(list(shards), self.context.dp_rank, self.context.dp_size, self.on_error, self.max_skipped,
                           self.limit)
        rows, tiles = [], []
        with told_to_all(self.context):
            for answers in greedy_answers(iter(reader), self.policy, self.question, self.max_new_tokens,
                                          self.batch_size):
                for sample, completion in answers:
                    rows.append(answer_row(sample, completion))
                    if len(tiles) < self.num_pictures and self.context.dp_rank == 0:
                        tiles.append(answer_tile(sample, rows[-1]))
        with told_to_all(self.context):
            samples, skipped = usable_samples(reader, self.context)
            scores = AnswerScores(in_stored_order(self.context.gather_rows(rows), samples))
            if not samples:
                raise BadData(f"evaluation set {name}: {list(shards)} hold no usable sample; skipped: {dict(skipped)}")
            check_complete(name, samples, scores.rows)
            result = scores.result() | {"skipped": sum(skipped.values())}
        title = f"{name}: {headline_text(result)}, parsed {result['parse_rate']:.1%}"
        picture = panel(tiles, 4, title) if tiles else None
        return result, scores.rows, picture


def check_complete(name: str, samples: Sequence[Sample], rows: Sequence[dict]) -> None:
    """Raise ValueError unless there is just one row for each sample."""
    expected, found = {(s.shard, s.key) for s in samples}, {(row["shard"], row["key"]) for row in rows}
    if expected != found or len(rows) != len(found):
        missing = sorted(expected - found)
        raise ValueError(f"evaluation set {name}: {len(rows)} rows for {len(samples)} usable samples; without an "
                         f"answer: {missing[:3]}, not asked for: {sorted(found - expected)[:3]}; did the shards change "
                         "while they were read?")
