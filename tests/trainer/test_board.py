"""TensorBoard's side of a run on two pipeline stages, killed and resumed, read as TensorBoard does."""

from __future__ import annotations

import html
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from megavg.trainer.board import ROOMS, hyperparameters, tag
from tests.distributed import run_ranks
from tests.tiny_runs import read_metrics, run_tree, train
from tests.trainer.conftest import WARM, train_until
from tests.trainer.event_files import read_board, texts


def killed_and_resumed(killed: dict, resumed: dict) -> list[str]:
    """The event files after the first process, whose last checkpoint is lost, so that the second takes a step again."""
    train_until(killed, 2)
    folder = Path(killed["trainer"]["output_dir"])
    files = sorted(path.name for path in (folder / "tensorboard").iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "checkpoints" / "step-000002")
    dist.barrier()
    train(resumed)
    return files


@pytest.fixture(scope="module")
def run(checkpoints, few_scenes, tmp_path_factory):
    """(folder of a run on PP2, where the second rank writes, that was killed after step 2 and went on from step 1 to
    step 3; the event files when it was killed)."""
    folder = tmp_path_factory.mktemp("board") / "run"
    options = ("parallel.pipeline_model_parallel_size=2", f"evaluation.sets.seen=[{few_scenes}]",
               "evaluation.at_start=true", "evaluation.at_end=true", "evaluation.limit=2", "rollout.group_size=2",
               "data.prompts_per_step=2", "rollout.max_new_tokens=8", "trainer.num_steps=3", "trainer.save_every=1",
               "trainer.picture_every=1", "trainer.diagnostics_every=1", "trainer.log_every=1",
               "trainer.tensorboard=true")
    killed = run_tree(checkpoints("qwen3_vl", **WARM), few_scenes, folder, *options)
    resumed = run_tree(checkpoints("qwen3_vl", **WARM), few_scenes, folder, *options, "trainer.resume=true")
    files = run_ranks(2, killed_and_resumed, killed, resumed)
    return folder, files[0]


@pytest.fixture(scope="module")
def board(run):
    return read_board(run[0] / "tensorboard")


def log_on_rank(folder: str) -> bool:
    from megavg.parallel.mcore import make_context
    from megavg.trainer.run_log import RunLog

    context = make_context(2, 2, torch.device("cpu"))
    with RunLog(Path(folder), context.is_writer, 8, 0, 1, tensorboard=True) as log:
        log.record(1, {"loss": 1.0})
    dist.barrier()  # the first rank holds what the others need to find each other
    return context.is_writer


def test_one_of_four_ranks_writes(tmp_path):
    """TP2 x PP2: the first tensor-parallel rank of the last stage."""
    assert run_ranks(4, log_on_rank, str(tmp_path)) == [False, False, True, False]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_one_process_writes(run):
    """Each start of the run made one file."""
    folder, before = run
    now = sorted(path.name for path in (folder / "tensorboard").iterdir())
    assert len(before) == 1 and len(now) == 2 and before[0] in now
    assert all(name.startswith("events.out.tfevents.") for name in now)


def test_every_number_of_the_metrics_stands_there_once(run, board):
    """So the step that was taken twice is not doubled, and the evaluation before it is not lost."""
    lines = read_metrics(run[0])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    expected: dict[str, list] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                expected.setdefault(tag(name), []).append((line["step"], pytest.approx(value, rel=1e-6, abs=1e-12)))
    found = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert [step for step, _ in found.pop("best/seen_acc_at_50")] == [0, 3]
    assert found == expected
    assert {name.partition("/")[0] for name in found} <= set(ROOMS)


def test_pictures_histograms_and_texts_stand_there_once(run, board):
    assert [event.step for event in board.Images("train/answers")] == [1, 2, 3]
    assert [event.step for event in board.Images("eval/seen")] == [0, 3]
    assert [event.step for event in board.Histograms("tokens/entropy/all")] == [1, 2, 3]
    assert list(texts(board, "reasons")) == list(texts(board, "train/answers")) == [1, 2, 3]
    assert yaml.safe_load(texts(board, "config")[2]) == yaml.safe_load((run[0] / "config.yaml").read_text())


def test_answers_are_shown_as_they_are(board):
    """An untrained model writes anything; it stays in its cell."""
    for text in texts(board, "train/answers").values():
        rows = text.splitlines()
        assert len(rows) == 2 + 2 and all(row.count("|") == 6 for row in rows), "one of each prompt, five cells"
        assert "<" not in text
        key, question, _, reward, reasons = (html.unescape(cell).strip() for cell in rows[2].strip("| ").split(" | "))
        assert key.startswith("scene") and question.startswith("Locate the ") and reward.endswith(" at IoU 0.00")
        assert reasons.startswith("iou: ") and "; format: " in reasons


def test_the_hparams_tab_finds_the_run(run):
    """Asked as the tab asks: its options, the metrics beside them, and that it succeeded."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = EventMultiplexer().AddRunsFromDirectory(str(run[0]))
    events.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(events, str(run[0]))))
    asked = RequestContext(), "0"
    experiment = context.experiment_from_metadata(*asked, True, context.hparams_metadata(*asked), [])
    tree = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert {info.name for info in experiment.hparam_infos} == set(hyperparameters(tree))
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics[0] == "best/seen_acc_at_50" and {"reward/mean", "policy/loss"} <= set(metrics)
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos])
    group, = list_session_groups.Handler(asked[0], context, asked[1], request).run().session_groups
    assert group.hparams["optimizer.lr"].number_value == tree["optimizer"]["lr"]
    assert group.hparams["algorithm.name"].string_value == "ecvgpo"
    values = {value.name.tag: value.value for value in group.metric_values}
    assert values["reward/mean"] == pytest.approx(read_metrics(run[0])[-2]["reward/mean"])


@pytest.mark.parametrize(("name", "expected"), [
    ("loss", "policy/loss"), ("lr", "policy/lr"), ("tokens_per_second", "time/tokens_per_second"),
    ("kl/reference", "policy/kl_reference"), ("iou/mean", "reward/iou_mean"), ("reward/iou", "reward/iou"),
    ("self_information/think", "entropy/self_information_think"), ("response/length", "data/response_length"),
    ("eval/a/acc_at_50", "eval/a/acc_at_50"), ("ecvgpo/alpha", "method/ecvgpo/alpha"), ("strange", "method/strange")])
def test_rooms(name, expected):
    assert tag(name) == expected


def test_hyperparameters_are_plain_and_leave_paths_of_data_out(grpo_options):
    found = hyperparameters(grpo_options)
    assert found["rollout.group_size"] == 4 and found["algorithm.name"] == "grpo" and found["trainer.seed"] == 0
    assert found["data.noise.probability"] == 0.0 and found["rewards"].startswith('[{"name": "iou"}')
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
    assert not [name for name in found if "shards" in name or "output_dir" in name]


@pytest.fixture
def grpo_options(tmp_path):
    """A resolved configuration."""
    from megavg.trainer.config import resolve

    return resolve(run_tree(tmp_path, tmp_path, tmp_path, "algorithm={name: grpo}")).tree()
