"""Write a reward as one function in one file, name it in the configuration, and it is weighted into the sum.

The contract, which ``tests/rewards/test_rewards.py`` puts to every file of this folder:

- A reward is a module with a function ``reward(completion, sample, *, options...) -> RewardResult``. Options are
  keyword-only, typed and have defaults; the loader checks the configuration against them.
- The score is 0..1 (a penalty is a negative weight), and 0 for an empty or unparseable answer. The reason is a few
  words that can be counted.
- It never raises because of what the model wrote, and never evaluates it.
- A module may also hold ``check_options(**options)``, called once at start-up, that raises ValueError on a bad value.

In the configuration, where a dotted name or the path of a file loads a module from outside the package::

    rewards:
      - {name: iou, weight: 1.0}
      - {name: iou, weight: 0.5, threshold: 0.5}
      - {name: format, weight: 0.1}
      - {name: my_package.my_reward, weight: 0.2, some_option: 3}
      - {name: examples/custom_reward.py, weight: 0.2}
      - {name: point_in_box, tasks: [point]}

With ``tasks`` a reward judges only the samples of these tasks, and gives 0 to the others ("other task"): for mixtures.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Sequence

from megavg.protocols.plugin import load_module, nearest, short_name
from megavg.protocols.sample import TASKS, Completion, Reward, RewardResult, Sample

OTHER_TASK = RewardResult(0.0, "other task")
"""What a reward gives a sample whose task is not among its ``tasks``."""
_OWN = ("name", "weight", "tasks")  # keys of an entry that are no options of the reward


@dataclass(frozen=True)
class Term:
    """One reward of the weighted sum.

    Attributes:
        name: unique in its list, for metrics: the plug-in's name, with "_2", "_3" after it when it is listed again;
            of a file the name without folder and ".py".
        weight: factor in the sum; a negative one makes a penalty.
        function: the plug-in's ``reward``.
        options: keyword arguments of ``function``.
        tasks: tasks of the samples that it judges; empty for all.
    """

    name: str
    weight: float
    function: Reward
    options: dict = field(default_factory=dict)
    tasks: tuple[str, ...] = ()


def load_rewards(config_list: Sequence[Mapping[str, Any]]) -> list[Term]:
    """Turn the ``rewards`` section of a configuration into terms, checking every name, option and type.

    Args:
        config_list: entries ``{"name": ..., "weight": 1.0, "tasks": [], **options}``; weight and tasks may be left out.

    Raises:
        ValueError: an empty list, an unknown reward or option (with the nearest name), a value of the wrong type, or a
            module without a function ``reward``.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list:
        raise ValueError(f"rewards: expected a list of one or more entries such as {{name: iou}}, got {config_list!r}")
    terms: list[Term] = []
    for index, entry in enumerate(config_list):
        term = _load_term(entry, f"rewards[{index}]")
        taken = {other.name for other in terms}
        candidates = [term.name, *(f"{term.name}_{n}" for n in range(2, len(terms) + 2))]
        name = next(candidate for candidate in candidates if candidate not in taken)
        terms.append(dataclasses.replace(term, name=name))
    return terms


def score(
    completion: Completion, sample: Sample, terms: Sequence[Term]
) -> tuple[float, dict[str, RewardResult]]:
    """Score one answer with every term: the weighted sum, and each term's own unweighted result by name.

    Raises:
        ValueError: a term failed, or returned something else than a RewardResult with a score in 0..1 and a reason; or
            the completion's frame was made for an image of another size.
    """
    check_frame(completion, sample)
    results = {}
    for term in terms:
        if term.tasks and sample.task not in term.tasks:
            results[term.name] = OTHER_TASK
            continue
        results[term.name] = _result(term, completion, sample)
    return math.fsum(term.weight * results[term.name].score for term in terms), results


def _result(term: Term, completion: Completion, sample: Sample) -> RewardResult:
    """What one term gives; ValueError names the term and the sample where it fails or breaks the contract."""
    where = f"reward {term.name!r} on sample {sample.key!r}"
    try:
        result = term.function(completion, sample, **term.options)
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}; a reward may not fail on any text") from error
    if not isinstance(result, RewardResult) or not isinstance(result.reason, str) or not result.reason:
        raise ValueError(f"{where}: expected a RewardResult with a score and a reason, got {result!r}")
    # A rounding error beyond 1 is none of the author's mistakes; NaN fails both comparisons.
    if not isinstance(result.score, numbers.Real) or not -1e-9 <= result.score <= 1 + 1e-9:
        raise ValueError(f"{where}: expected a score in 0..1, got {result.score!r}; scale it in the reward, and use "
                         "its weight in the configuration for a larger share or, below 0, a penalty")
    return result


def check_frame(completion: Completion, sample: Sample) -> None:
    """Raise ValueError when the completion's frame belongs to another image: every box would be silently wrong."""
    frame = completion.frame
    if (frame.original_width, frame.original_height) != (sample.width, sample.height):
        raise ValueError(f"sample {sample.key!r} is {sample.width} x {sample.height} pixels, but its completion's "
                         f"frame says {frame.original_width} x {frame.original_height}; make the frame from this "
                         "sample")


def _load_term(entry: Mapping[str, Any], where: str) -> Term:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: expected a mapping with a name, such as {{name: iou, weight: 1.0}}, got {entry!r}")
    options = {key: value for key, value in entry.items() if key not in _OWN}
    name, weight, tasks = entry["name"], entry.get("weight", 1.0), entry.get("tasks", [])
    if not _fits(weight, float) or not math.isfinite(weight):
        raise ValueError(f"{where}.weight: expected a finite number, got {weight!r}")
    if not isinstance(tasks, (list, tuple)) or not all(task in TASKS for task in tasks):
        raise ValueError(f"{where}.tasks: expected a list out of {', '.join(TASKS)}, got {tasks!r}")
    module = load_module("megavg.rewards", name, f"{where}.name")
    function = getattr(module, "reward", None)
    if not callable(function):
        file = getattr(module, "__file__", None) or module.__name__
        raise ValueError(f"{where}.name={name!r}: {file} holds no function named reward")
    _check_options(function, options, f"{where} ({name})")
    if hasattr(module, "check_options"):
        _call_check(module.check_options, options, f"{where} ({name})")
    return Term(short_name(name), float(weight), function, options, tuple(tasks))


def _call_check(check_options: Callable, options: dict, where: str) -> None:
    try:
        check_options(**options)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{where}: check_options fails: {type(error).__name__}: {error}") from error


def _check_options(function: Reward, options: dict, where: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function)
    except Exception as error:  # annotations may be any expression
        raise ValueError(f"{where}: the annotations of reward cannot be read ({type(error).__name__}: {error}); import "
                         "what they name where it is also there at run time, not under TYPE_CHECKING") from error
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key, value in options.items():
        if key not in known:
            if takes_any:
                continue
            raise ValueError(f"{where}: there is no option {key!r}{nearest(key, [*known, *_OWN])}")
        if key in hints and not _fits(value, hints[key]):
            raise ValueError(f"{where}.{key}: expected {_describe(hints[key])}, got {value!r}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise ValueError(f"{where}: the option {missing[0]!r} has no default; set it")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML has the annotated type; a whole number is a float too, True is no number."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if isinstance(value, bool) and hint in (int, float):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
