"""SaEI's attack and the two-stage schedule on a real model that was trained a little."""

from __future__ import annotations

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.saei import SaEI
from megavg.data.scenes import scenes
from megavg.trainer.config import resolve
from megavg.trainer.explorer import PolicyExplorer
from megavg.trainer.rollouts import encode
from megavg.trainer.trainer import Trainer
from tests.distributed import run_ranks
from tests.tiny_runs import train, training_lines

EPS = 8 / 255
NUM_IMAGES = 24


class Kept(PolicyExplorer):
    """Remembers the prompts on other images that answers were sampled from."""

    def sample(self, num_answers, first=0, prompts=None):
        self.attacked = prompts
        return super().sample(num_answers, first, prompts)


def attack_figures(tree: dict) -> dict:
    """What each kind of attack does to J on unseen scenes, and what it leaves behind."""
    trainer = Trainer(resolve(tree))
    policy = trainer.policy
    samples = list(scenes(NUM_IMAGES, seed=5))
    prompts = encode(samples, policy.processor, lambda sample: f"Locate {sample.expression}.")
    streams = [f"stream/{i}" for i in range(NUM_IMAGES)]

    def explore(algorithm, prompts=prompts):
        explorer = Kept(policy, prompts, streams, 6, trainer.config.rollout, trainer.batcher, 1.0)
        answers = algorithm.explore(explorer, 0.0)
        return explorer, [[answer.tokens for answer in group] for group in answers]

    plain = explore(GRPO(GRPO.Config()))[1]
    before = {name: tensor.clone() for name, tensor in policy.engine.weights()}
    found: dict = {"gains": {}, "distance": {}, "outside": {}, "same_frames": {}}
    for direction, steps in (("gradient", 1), ("gradient", 4), ("random_sign", 1)):
        algorithm = SaEI(SaEI.Config(eps=EPS, steps=steps, direction=direction, report_gain=True))
        explorer, answers = explore(algorithm)
        assert [group[:3] for group in answers] == [group[:3] for group in plain], "the first half is on clean images"
        key, layout = f"{direction} {steps}", explorer.pixels
        clean_sum, attacked_sum, count = algorithm._gains
        found["clean"], found["gains"][key] = clean_sum / count, (attacked_sum - clean_sum) / count
        pairs = [(layout.split(a.pixel_values), layout.split(b.pixel_values))
                 for a, b in zip(explorer.attacked, prompts)]
        std = torch.tensor(layout.std)[:, None, None]
        black, white = layout.bounds(pairs[0][0])
        found["distance"][key] = max(float(((a - b).abs() * std).max()) for a, b in pairs)
        found["outside"][key] = max(float((black - a).max().maximum((a - white).max())) for a, _ in pairs)
        found["same_frames"][key] = all(bool((a == a[:, :, :1]).all()) for a, _ in pairs)
    found["no_eps_is_plain"] = explore(SaEI(SaEI.Config(eps=0.0)))[1] == plain
    # a model of seconds answers the same on images that hardly differ, so these are painted all over
    painted = explore(SaEI(SaEI.Config(eps=1.0)))[1]
    found["changed_answers"] = sum(a[3:] != b[3:] for a, b in zip(painted, plain))
    found["parameter_gradients"] = sum(p.grad is not None for p in policy.generator.stage.parameters())
    found["same_weights"] = all(torch.equal(before[name], tensor) for name, tensor in policy.engine.weights())
    return found


@pytest.fixture(scope="module")
def attacks(grpo_tree, tmp_path_factory):
    tree = grpo_tree(tmp_path_factory.mktemp("attacks") / "run", "algorithm={name: grpo}",
                     "trainer.micro_batch_size=32")
    return run_ranks(1, attack_figures, tree)[0]


def test_the_gradient_raises_entropy_more_than_random_signs(attacks):
    """On average over unseen images. This model, trained for seconds, hardly looks at its image; docs/algorithms.md has
    the figures of one that does. Random signs have no effect to first order, so theirs may have either sign here."""
    gains = attacks["gains"]
    print({"clean": attacks["clean"], **gains})
    assert gains["gradient 1"] > 5 * abs(gains["random_sign 1"])
    assert gains["gradient 4"] > gains["gradient 1"] > 5e-4


def test_the_ball_and_the_range_of_pixels_are_respected(attacks):
    for key, distance in attacks["distance"].items():
        assert 0.9 * EPS < distance <= EPS * (1 + 1e-6), key
        assert attacks["outside"][key] <= 1e-6 and attacks["same_frames"][key], key


def test_no_eps_is_grpo_and_nothing_is_left_behind(attacks):
    assert attacks["no_eps_is_plain"] and attacks["changed_answers"] > NUM_IMAGES / 4
    assert attacks["parameter_gradients"] == 0 and attacks["same_weights"]


@pytest.fixture(scope="module")
def two_stages(grpo_tree, tmp_path_factory):
    """Output folder of a run whose two stages are 7 steps long each."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    tree = grpo_tree(folder, "algorithm={name: two_stage+dapo, lambda_max: 0.2, lambda_min: 0.2, switch: 0.5, "
                             "resample_tries: 0}", "trainer.num_steps=14", "optimizer.lr=3e-4",
                     "trainer.diagnostics_every=7", "trainer.tensorboard=true")
    run_ranks(1, train, tree)
    return folder


def test_entropy_rises_and_then_falls(two_stages):
    lines = training_lines(two_stages)
    assert [line["two_stage/coefficient"] for line in lines] == pytest.approx([0.2] * 7 + [-0.2] * 7)
    entropy = [line["two_stage/entropy_ratio"] for line in lines]
    print([round(value, 2) for value in entropy])
    peak = max(entropy)
    assert entropy[0] == 1.0 and peak > 1.5 and entropy.index(peak) >= 5 and entropy[-1] < 0.9 * peak
    assert lines[-1]["two_stage/peak_share"] == pytest.approx(entropy[-1] / peak)


def test_tokens_are_looked_at(two_stages):
    """Figures by kind of token each step; histograms and a page every 7 steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for line in training_lines(two_stages):
        assert {"entropy/digits", "entropy/format", "self_information/digits", "selected/format"} <= set(line)
    board = EventAccumulator(str(two_stages / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    names = {f"tokens/{what}/{part}" for what in ("entropy", "self_information", "weight", "advantage")
             for part in ("all", "digits", "format")}
    assert names <= set(board.Tags()["histograms"])
    assert [event.step for event in board.Histograms("tokens/entropy/all")] == [7, 14]
    pages = sorted((two_stages / "heat_maps").iterdir())
    assert [page.name for page in pages] == ["step-000007.html", "step-000014.html"]
    assert "Answers at step 14" in pages[1].read_text()
