"""A run saved in one layout goes on in another, optimiser state included, as it would have gone on in its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavg.checkpoint.sharded import ShardedFolder
from tests.distributed import run_ranks
from tests.tiny_models import sharpened
from tests.tiny_runs import run_tree, train, training_lines

pytestmark = pytest.mark.slow

# the order in which one set of processes may make them: DeepSpeed numbers modules over a process' life
CHAIN = {"tp2pp2dp2": (2, 2, 2), "dp4": (1, 1, 4), "tp4": (4, 1, 1), "pp4": (1, 4, 1), "one process": (1, 1, 1)}
HOPS = list(zip(CHAIN, list(CHAIN)[1:]))
TOLERANCE = 1e-6
FAMILIES = {"qwen2_5_vl": False, "qwen3_vl": True}  # whose head is tied to the embedding


def train_all(trees: list[dict]) -> None:
    for tree in trees:
        train(tree)


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request, checkpoints, scene_shards, tmp_path_factory) -> Path:
    """Folder of one run for each layout: each goes on from the second step of the one before, for four steps."""
    folder = tmp_path_factory.mktemp("chain")
    # 515 tokens divide by no size, there are 2 key-value heads, deepstack enters the first 2 layers
    model = sharpened(checkpoints(request.param, num_layers=5, vision_depth=2, tie_embeddings=FAMILIES[request.param]))
    worlds: dict[int, list] = {}
    for number, (name, (tp, pp, dp)) in enumerate(CHAIN.items()):
        before = list(CHAIN)[number - 1]
        start = [f"trainer.resume={folder / before / 'checkpoints' / f'step-{2 * number:06d}'}"] if number else []
        worlds.setdefault(tp * pp * dp, []).append(run_tree(
            model, scene_shards(16), folder / name, "algorithm={name: sft}", *start,
            f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}",
            "trainer.micro_batch_size=1", "trainer.save_every=2", "trainer.keep_last=9",
            f"trainer.num_steps={2 * number + 4}", "optimizer.lr=1e-3",
            "optimizer.eps=1e-6"))  # AdamW divides rounding by itself where a gradient is as small
    for world, trees in worlds.items():
        run_ranks(world, train_all, trees, timeout=600)
    return folder


@pytest.mark.parametrize("old,new", HOPS)
def test_goes_on_as_it_would_have_in_its_own_layout(chain, old, new):
    step = 2 * HOPS.index((old, new)) + 4
    expected, found = (ShardedFolder(chain / name / "checkpoints" / f"step-{step:06d}" / "state") for name in (old, new))
    assert expected.tensors == found.tensors
    worst = {kind: 0.0 for kind in ("weights", "exp_avg", "exp_avg_sq")}
    for name in expected.tensors:
        difference = float((expected.read(name) - found.read(name)).abs().max())
        worst[name.split("/")[0]] = max(worst[name.split("/")[0]], difference)
    assert {kind: value for kind, value in worst.items() if not value <= TOLERANCE} == {}, worst


def test_the_steps_between_matter(chain):
    """Two steps change weights and both moments by far more than the tolerance."""
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"{kind}/model.language_model.layers.0.mlp.down_proj.weight"
        first, last = (ShardedFolder(chain / "dp4" / "checkpoints" / step / "state").read(name)
                       for step in ("step-000004", "step-000006"))
        assert float((first - last).abs().max()) > 3 * TOLERANCE


def test_losses_go_on(chain):
    for old, new in HOPS:
        after = {line["step"]: line["loss"] for line in training_lines(chain / old)}
        before = {line["step"]: line["loss"] for line in training_lines(chain / new)}
        assert len(after.keys() & before.keys()) == 2 and len(before) == 4
        for step in after.keys() & before.keys():
            assert before[step] == pytest.approx(after[step], abs=1e-5)


def test_padding_of_the_vocabulary_is_not_kept(chain):
    for name in CHAIN:
        folder = next((chain / name / "checkpoints").glob("step-*")) / "state"
        shape, dtype = ShardedFolder(folder).tensors["weights/model.language_model.embed_tokens.weight"]
        assert shape[0] == 515 and dtype == torch.float32
