"""Which layouts a number of GPUs allows, in the order in which they are preferred, and what helps where none fits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Iterator

from tools.layouts import Layout
from tools.plan_work import Work

if TYPE_CHECKING:
    from tools.plan_memory import Prediction, Predictor

MOST_GPUS = 1024


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs that are planned for.

    Attributes:
        gpus: of all nodes.
        gpus_per_node: among which tensor parallelism stays.
        budget: bytes of one GPU that a run may take.
    """

    gpus: int
    gpus_per_node: int
    budget: float

    def layouts(self) -> list[Layout]:
        """Least communication first: data parallelism, then tensor parallelism inside a node, then pipeline stages."""
        found = [Layout(tp, pp, self.gpus // (tp * pp)) for tp in _divisors(min(self.gpus, self.gpus_per_node))
                 for pp in _divisors(self.gpus // tp)]
        return sorted(found, key=lambda layout: (layout.tp * layout.pp, layout.pp))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def predictions(predictor: Predictor, machine: Machine, work: Work, recompute: bool | None,
                refused: dict[str, str] | None = None) -> Iterator[Prediction]:
    """One prediction for each layout that the model allows, preferred ones first.

    Args:
        recompute: None recomputes only where the layout does not fit without.
        refused: takes the reason of each layout that is not allowed.
    """
    for layout in machine.layouts():
        try:
            found = predictor.predict(layout, dataclasses.replace(work, recompute=bool(recompute)))
            if recompute is None and found.total > machine.budget:
                found = predictor.predict(layout, dataclasses.replace(work, recompute=True))
        except ValueError as error:
            if refused is not None:
                refused[str(layout)] = str(error)
            continue
        yield found


def best(predictor: Predictor, machine: Machine, work: Work, recompute: bool | None) -> Prediction | None:
    """The preferred layout that fits."""
    return next((found for found in predictions(predictor, machine, work, recompute)
                 if found.total <= machine.budget), None)


def remedies(predictor: Predictor, machine: Machine, work: Work,
             recompute: bool | None) -> list[tuple[str, Prediction | None]]:
    """What to change where nothing fits, alone and all together, with the layout that fits then."""
    single = [("--recompute", {}, True if recompute is False else recompute),
              ("--micro-batch 1", {"micro_batch": 1}, recompute),
              ("--prompts-per-pass 1", {"prompts_per_pass": 1}, recompute),
              ("--freeze-vision-tower", {"freeze_vision_tower": True}, recompute),
              ("--offload", {"offload": True}, recompute)]
    useful = [(name, changes, again) for name, changes, again in single
              if dataclasses.replace(work, **changes) != work or again is not recompute]
    found = [(name, best(predictor, machine, dataclasses.replace(work, **changes), again))
             for name, changes, again in useful]
    if len(useful) > 1:
        everything = dataclasses.replace(work, **{key: value for _, changes, _ in useful
                                                  for key, value in changes.items()})
        again = None if recompute is False else recompute
        found.append((" ".join(name for name, _, _ in useful), best(predictor, machine, everything, again)))
    gpus, fits = machine.gpus, None
    while fits is None and 2 * gpus <= MOST_GPUS:
        gpus *= 2
        fits = best(predictor, dataclasses.replace(machine, gpus=gpus), work, recompute)
    return [*found, (f"--gpus {gpus}", fits)]


def fewest_gpus(predictor: Predictor, machine: Machine, work: Work, recompute: bool | None) -> Prediction | None:
    """The layout that fits on the fewest GPUs, among powers of two up to ``machine.gpus``."""
    gpus = 1
    while gpus <= machine.gpus:
        found = best(predictor, dataclasses.replace(machine, gpus=gpus), work, recompute)
        if found is not None:
            return found
        gpus *= 2
    return None
