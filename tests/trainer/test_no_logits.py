"""Nowhere in training is there a tensor of all scored tokens by the vocabulary: every tensor of a run is looked at."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, train, training_lines

VOCAB_SIZE = 5003
HIDDEN_SIZE = 64


class WatchVocabulary(TorchDispatchMode):
    """Keeps the largest number of fp32 rows of any tensor with a dimension as long as the vocabulary or its shard."""

    def __init__(self, sizes: set[int]):
        super().__init__()
        self.sizes, self.most_rows = sizes, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                for size in self.sizes & set(tensor.shape):
                    rows = tensor.numel() // size * tensor.element_size() / 4  # DeepSpeed sends weights as bytes
                    self.most_rows = max(self.most_rows, rows)
        return result


def watched_training(trees: list[dict], vocab_sizes: set[int]) -> float:
    with WatchVocabulary(vocab_sizes) as watch:
        for tree in trees:
            train(tree)
    return watch.most_rows


@pytest.mark.parametrize("tp_size", [1, 2])
def test_no_tensor_of_tokens_by_vocabulary(checkpoints, scene_shards, tmp_path, tp_size):
    """Supervised, and by reinforcement with a reference and an entropy bonus: scorer, loss and reference."""
    checkpoint, shards = checkpoints("qwen3_vl", vocab_size=VOCAB_SIZE), scene_shards(8)
    common = (f"parallel.tensor_model_parallel_size={tp_size}", "trainer.num_steps=1", "trainer.micro_batch_size=16",
              "rollout.max_new_tokens=32")
    trees = [run_tree(checkpoint, shards, tmp_path / "sft", "algorithm={name: sft}", "data.prompts_per_step=16",
                      *common),
             run_tree(checkpoint, shards, tmp_path / "rl", "algorithm.kl_coefficient=0.1",
                      "algorithm.entropy_coefficient=0.01", *common)]
    shard = -(-VOCAB_SIZE // tp_size)  # the last rank's ends with padding
    sizes = {VOCAB_SIZE, shard, shard * tp_size, VOCAB_SIZE - shard * (tp_size - 1)}
    most_rows = run_ranks(tp_size, watched_training, trees, sizes)
    for name in ("sft", "rl"):
        line, = training_lines(tmp_path / name)
        assert line["tokens"] > 4 * HIDDEN_SIZE, "or the head itself would have as many rows"
    # the head and its gradient have D rows, logits that answers are sampled from one row per answer
    assert max(most_rows) == HIDDEN_SIZE


def test_the_watch_sees_logits():
    hidden, weight = torch.randn(200, 8), torch.randn(VOCAB_SIZE, 8)
    with WatchVocabulary({VOCAB_SIZE}) as watch:
        torch.nn.functional.linear(hidden, weight).log_softmax(-1)
    assert watch.most_rows == 200
