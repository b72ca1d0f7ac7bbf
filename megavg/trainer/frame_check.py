"""Find out before training whether the starting model answers in the frame of coordinates that the run reads.

The model answers greedily on a few samples whose boxes are known, and the numbers of its answers are compared with the
truth in every frame that models use. A wrong frame gives no error by itself, only rewards that stay near zero.

The rule. Another frame fits far better when at least ``MIN_ANSWERS`` answers could be read, its mean overlap with the
truth is more than ``1 / OWN_SHARE`` times that of the run's own reading and ``MIN_GAIN`` above it, and it is nearer to
the truth in at least ``MIN_WINS`` of the samples in which the two differ. Answers do not parse when fewer than one in
ten is written as the run reads them. With fewer than ``MIN_ANSWERS`` answers nothing else can be said.

Near 1000 pixels a side, thousandths and pixels are nearly the same number, and no rule on the means can tell them
apart. A frame that fits every answer a little better (``MIN_HINTS`` of them, by ``HINT_GAIN``) is therefore told,
and stops nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable, Sequence

from megavg.ops.box_formats import FRAME_KIND, TOKENS
from megavg.parallel.context import ParallelContext
from megavg.protocols.sample import Sample
from megavg.trainer.answering import LoadedModel
from megavg.trainer.bad_data import told_to_all
from megavg.trainer.evaluator import greedy_answers
from megavg.trainer.frame_look import CANDIDATES, ORDERS, OTHER, OWN, UNITS, Look, look_at, true_boxes
from megavg.trainer.policy import Policy

MIN_ANSWERS = 4
OWN_SHARE = 0.5
MIN_GAIN = 0.2
MIN_WINS = 0.75
MIN_HINTS = 6
HINT_GAIN = 0.02

_MAX_DRAWS = 4


@dataclass(frozen=True)
class FrameReport:
    """What the looks at all answers come to.

    Attributes:
        looks: one for each sample, those of all ranks.
        box_format: the format that the run reads.
        needs_answers: whether the algorithm learns from the model's own answers, so that none that parses is a mistake.
    """

    looks: tuple[Look, ...]
    box_format: str
    needs_answers: bool

    @property
    def read(self) -> list[Look]:
        """The looks at answers whose numbers could be read."""
        return [look for look in self.looks if look.written]

    @property
    def own(self) -> int:
        """Place of the run's frame in ``CANDIDATES``."""
        return CANDIDATES.index((FRAME_KIND[self.box_format], "xy"))

    @property
    def own_mean(self) -> float:
        """Mean overlap as the run reads the answers: it finds nothing in one of the other kind."""
        return _mean([self._own_overlap(look) for look in self.read])

    @property
    def means(self) -> list[float]:
        """Mean overlap by candidate, however the numbers are written."""
        return [_mean([look.overlaps[place] for look in self.read]) for place in range(len(CANDIDATES))]

    @property
    def best(self) -> int:
        """Place of the frame that fits best; of equals the run's own."""
        means = self.means
        return max(range(len(means)), key=lambda place: (means[place], place == self.own))

    @property
    def verdict(self) -> str:
        """"other frame", "no answer parses", "too few answers", "nothing known" or "fits"."""
        if not self.looks:
            return "nothing known"
        if len(self.read) >= MIN_ANSWERS and self._is_far_better(self.best):
            return "other frame"
        if sum(look.written == OWN for look in self.looks) < len(self.looks) / 10:
            return "no answer parses"
        return "too few answers" if len(self.read) < MIN_ANSWERS else "fits"

    @property
    def hint(self) -> str:
        """What is to be said of another frame that fits all answers a little better; empty where none does."""
        gains = [look.overlaps[self.best] - self._own_overlap(look) for look in self.read]
        differing = [gain for gain in gains if gain]
        if self.best == self.own or len(differing) < MIN_HINTS or min(differing) < 0 or _mean(gains) < HINT_GAIN:
            return ""
        return (f"BUT each of {len(differing)} answers fits better as {self._name(self.best)} (mean IoU "
                f"{self.means[self.best]:.3f}): is this the model's frame? Pictures of about 1000 pixels hide it; "
                "check again on smaller or larger ones")

    @property
    def stops(self) -> bool:
        """Whether training should not start."""
        return self.verdict == "other frame" or (self.verdict == "no answer parses" and self.needs_answers)

    def _own_overlap(self, look: Look) -> float:
        return look.overlaps[self.own] if look.written == OWN else 0.0

    def _is_far_better(self, place: int) -> bool:
        gains = [look.overlaps[place] - self._own_overlap(look) for look in self.read]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        mean, own = self.means[place], self.own_mean
        return own < OWN_SHARE * mean and mean - own > MIN_GAIN and wins >= MIN_WINS * (wins + losses)

    def message(self) -> str:
        """What was seen and what to do: the verdict, three answers, the table of frames and the remedy."""
        shown = sorted(self.looks, key=lambda look: not look.written)[:3]
        answers = [f"  {look.key}: {f'asked {look.asked[:200]!r}, ' if look.asked else ''}answered {look.text[:200]!r}"
                   f"{' (cut off)' if look.truncated else ''}" for look in shown]
        remedy = [f"  {self.remedy()}"] if self.stops else []
        hint = [f"  {self.hint}"] if self.verdict == "fits" and self.hint else []
        table = [self.table()] if self.looks else []
        return "\n".join([f"frame check: {self.summary()}", *hint, *answers, *table, *remedy])

    def summary(self) -> str:
        """The verdict in one line."""
        frequent = Counter(look.reason for look in self.looks).most_common(3)
        reasons = ", ".join(f"{reason}: {n}" for reason, n in frequent)
        counts = f"{len(self.read)} of {len(self.looks)} answers could be read ({reasons})"
        return {
            "nothing known": "no sample with a known box was found, so nothing can be said about the frame",
            "too few answers": f"only {counts}, fewer than {MIN_ANSWERS}: nothing can be said about the frame",
            "no answer parses": f"the starting model's answers do not parse as {self.box_format}: {counts}",
            "other frame": "the starting model answers in another frame than this run reads: its numbers fit far "
                           f"better as {self._name(self.best)} (mean IoU {self.means[self.best]:.3f}) than as this run "
                           f"reads them ({self.own_mean:.3f})",
            "fits": f"no other frame fits the starting model's answers far better than {self.box_format} (mean IoU "
                    f"{self.own_mean:.3f}); {counts}",
        }[self.verdict]

    def table(self) -> str:
        """Mean overlap with the truth (for points the share inside) in every frame, the best first."""
        means, lines = self.means, ["  mean IoU  read as"]
        for place in sorted(range(len(means)), key=lambda place: -means[place]):
            mark = f"   <- model.box_format={self.box_format}" if place == self.own else ""
            lines.append(f"  {means[place]:8.3f}  {self._name(place)}{mark}")
        others = sum(look.written == OTHER for look in self.read)
        if others:
            kinds = ("box tokens", "JSON") if self.box_format == TOKENS else ("JSON", "box tokens")
            lines.append(f"  {others} answers are written as {kinds[1]}, which this run, reading {kinds[0]}, cannot "
                         f"read; mean IoU as it reads them: {self.own_mean:.3f}")
        return "\n".join(lines)

    def remedy(self) -> str:
        """What to do about a verdict that stops."""
        go_on = "data.check_frame=off goes on all the same"
        if self.verdict == "no answer parses":
            cut = sum(look.truncated for look in self.looks)
            longer = f" raise rollout.max_new_tokens ({cut} answers were cut off);" if cut else ""
            return ("To mend it: ask so that the model answers in this format (data.prompt, data.prompts);" + longer
                    + " set model.box_format; or begin with supervised fine-tuning (algorithm.name=sft); " + go_on)
        fitting = self._fitting_format()
        if fitting:
            return f"To mend it: set model.box_format={fitting}; {go_on}"
        return ("To mend it: no box format of megavg reads this, so ask for the frame of this run in the prompt "
                f"(data.prompt, data.prompts), or fine-tune the model to it first; {go_on}")

    def _fitting_format(self) -> str | None:
        """The box format that reads the best frame as most answers are written."""
        unit, order = CANDIDATES[self.best]
        others = sum(look.written == OTHER for look in self.read) * 2 > len(self.read)
        tokens = (self.box_format == TOKENS) != others
        return next((name for name, kind in FRAME_KIND.items()
                     if kind == unit and order == "xy" and (name == TOKENS) == tokens), None)

    def _name(self, place: int) -> str:
        unit, order = CANDIDATES[place]
        return UNITS[unit] + ORDERS[order]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def known_samples(next_batch: Callable[[], list[Sample]], count: int, context: ParallelContext) -> list[Sample]:
    """This rank's share of the first ``count`` samples with a known box; all ranks call it.

    Args:
        next_batch: gives this data-parallel rank's items rank, rank + dp_size, ... of the next global batch. At most
            four batches are drawn.

    Raises:
        BadData: on every rank, where one meets a record that cannot be used.
    """
    found: list[tuple[int, Sample]] = []
    numbers: list[int] = []
    drawn = 0
    for _ in range(_MAX_DRAWS):
        with told_to_all(context):
            batch = next_batch()
        places = [(drawn + i) * context.dp_size + context.dp_rank for i in range(len(batch))]
        found += [(place, sample) for place, sample in zip(places, batch) if true_boxes(sample)]
        drawn += len(batch)
        numbers = sorted(context.gather_rows([place for place, _ in found]))[:count]
        if len(numbers) == count:
            break
    return [sample for place, sample in found if place in numbers]


def check_frame(model: Policy | LoadedModel, samples: Sequence[Sample], question: Callable[[Sample], str],
                max_new_tokens: int, context: ParallelContext, needs_answers: bool = True) -> FrameReport:
    """Let the model answer on this rank's ``samples`` and report on those of all ranks, which all call it.

    Raises:
        BadData: on every rank, where a prompt of one cannot be encoded.
    """
    looks: list[Look] = []
    with told_to_all(context):
        for answers in greedy_answers(iter(samples), model, question, max_new_tokens, len(samples) or 1):
            looks += [look_at(completion, sample, question(sample)) for sample, completion in answers]
    return FrameReport(tuple(context.gather_rows(looks)), model.processor.box_format, needs_answers)
