"""When one rank fails inside of a block, the others end with its message instead of waiting for it."""

from __future__ import annotations

import traceback

import pytest
import torch

from megavg.parallel.context import ParallelContext
from megavg.trainer.bad_data import BadData, told_to_all
from tests.distributed import run_ranks

CASES = {"all well": {}, "value": {1: ValueError("bad box")}, "disk": {0: OSError("disk full")},
         "fault": {1: TypeError("not a text")}, "end": {0: StopIteration(), 1: StopIteration()},
         "both": {0: ValueError("bad box"), 1: KeyError("labels")}}


def fail(error: Exception) -> None:
    raise error


def outcome(context: ParallelContext, errors: dict[int, Exception]) -> tuple[str, str, bool]:
    """Type and text of what the block raises on this rank, and whether the traceback leads to ``fail``."""
    try:
        with told_to_all(context):
            if context.rank in errors:
                fail(errors[context.rank])
        return "well", "", False
    except Exception as error:
        return type(error).__name__, str(error), "fail" in [f.name for f in traceback.extract_tb(error.__traceback__)]


def all_outcomes() -> list[tuple[str, str, bool]]:
    from megavg.parallel.mcore import make_context

    context = make_context(1, 1, torch.device("cpu"))
    return [outcome(context, errors) for errors in CASES.values()]


def test_a_failure_of_one_rank_ends_both():
    first, second = (dict(zip(CASES, found)) for found in run_ranks(2, all_outcomes, timeout=120))
    assert first["all well"] == second["all well"] == ("well", "", False)
    assert first["value"] == second["value"] == ("BadData", "bad box", False)
    assert first["disk"] == second["disk"] == ("BadData", "disk full", False)
    assert first["fault"] == ("BadData", "rank 1: TypeError: not a text", False)
    assert second["fault"] == ("TypeError", "not a text", True)
    assert first["end"] == second["end"] == ("StopIteration", "", True)
    assert first["both"] == ("BadData", "bad box", False) and second["both"] == ("KeyError", "'labels'", True)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), TypeError("x"), StopIteration(), KeyError("x")])
def test_a_single_process_keeps_faults_and_their_tracebacks(error):
    alone = ParallelContext(1, 0, 1, 0, None, 1, 0, None, 1, 0, None, torch.device("cpu"))
    if isinstance(error, (ValueError, OSError)):
        with pytest.raises(BadData, match="x") as caught:
            with told_to_all(alone):
                raise error
        assert caught.value.__cause__ is error
    else:
        with pytest.raises(type(error)) as caught:
            with told_to_all(alone):
                fail(error)
        assert caught.value is error and caught.traceback[-1].name == "fail"
