"""Methods joined by "+": what each brings is there, and what cannot be joined is refused with a clear error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from megavg.algorithms._compose import compose
from megavg.algorithms.adaptive_entropy import AdaptiveEntropy
from megavg.algorithms.base import Algorithm
from megavg.algorithms.dapo import DAPO
from megavg.algorithms.dr_grpo import DrGRPO
from megavg.algorithms.ecvgpo import ECVGPO
from megavg.algorithms.gspo import GSPO
from megavg.algorithms.papo import PAPO
from megavg.protocols.config import ConfigError, build, to_tree
from megavg.trainer.config import algorithm_class, resolve
from tests.algorithms.slow_losses import Plain, assert_equals_loops, group_advantages, moved
from tests.rollout_batches import random_batch

BASICS = {"model": {"path": "."}, "data": {"shards": ["*.tar"]}, "trainer": {"output_dir": "."}}


def test_one_name_is_the_class_itself():
    assert algorithm_class("dapo") is DAPO


def test_options_and_defaults():
    config = algorithm_class("adaptive_entropy+dapo").Config()
    assert (config.clip_low, config.clip_high, config.aggregation) == (0.2, 0.28, "token_mean"), "DAPO sets them anew"
    assert config.target_entropy == 0.2 and config.resample_tries == 10
    names = [field.name for field in fields(config)]
    assert len(names) == len(set(names))
    assert set(names) == {f.name for cls in (DAPO, AdaptiveEntropy) for f in fields(cls.Config)}


def test_the_first_that_sets_an_option_anew_gives_its_default():
    assert algorithm_class("dapo+dr_grpo").Config().aggregation == "token_mean"
    assert algorithm_class("dr_grpo+dapo").Config().aggregation == "constant"
    both = algorithm_class("dr_grpo+gspo+dapo").Config()
    assert (both.clip_low, both.clip_high, both.normalize_std) == (3e-4, 4e-4, False)


def test_every_check_of_options_is_made():
    cls = algorithm_class("adaptive_entropy+dapo")
    for options in ({"delta": -1.0}, {"overlong_cache": -1}, {"clip_low": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            build(cls.Config, options, "algorithm")
    with pytest.raises(ConfigError, match="did you mean 'overlong_cache'"):
        build(cls.Config, {"overlong_cach": 3}, "algorithm")


def test_options_survive_the_resolved_configuration():
    tree = {**BASICS, "algorithm": {"name": "papo+dapo", "papo_gamma": 0.02, "perturbation": {"mask_share": 0.5}}}
    config = resolve(tree)
    again = resolve(json.loads(json.dumps(config.tree())))
    assert to_tree(config) == to_tree(again) and again.algorithm.perturbation.mask_share == 0.5


@pytest.mark.parametrize("name, mark", [("dapo+gspo", "[exact]"), ("adaptive_entropy+dapo", "[reported]"),
                                        ("dapo+papo", "[reported]"), ("papo+ecvgpo", "[ours]")])
def test_the_mark_is_the_most_cautious(name, mark):
    cls = algorithm_class(name)
    assert cls.mark == mark and mark in cls.__doc__


def test_behaviour_of_all():
    """Dr. GRPO's advantages and mean, GSPO's ratio, DAPO's punishment and the adaptive bonus at once."""
    batch, stats = random_batch(1, dtype=torch.float64)
    stats = replace(stats, entropy=stats.entropy / 100)
    cls = algorithm_class("adaptive_entropy+dr_grpo+gspo+dapo")

    def slow(plain: Plain) -> float:
        rewards = [r - max(0, n - 5) / 2 for r, n in zip(plain.rewards, plain.lengths)]
        plain.advantages = group_advantages(rewards, plain.group_size, normalize_std=False)

        def objective(b: int, t: int) -> float:
            n, advantage = plain.lengths[b], plain.advantages[b]
            ratio = math.exp(sum(plain.new[b][i] - plain.old[b][i] for i in range(n)) / n)
            return min(ratio * advantage, min(max(ratio, 1 - 3e-4), 1 + 4e-4) * advantage)

        bonus = plain.loss(lambda b, t: 0.005 * plain.entropy[b][t], "token_mean")
        return plain.loss(objective, "constant") + bonus

    algorithm, *_ = assert_equals_loops(lambda: cls(cls.Config(overlong_cache=2)), batch, stats,
                                        moved(stats, batch.mask, 1e-3), slow)
    assert algorithm.resampling_tries == 10 and algorithm.state_dict() == {"bonus": 0.005}


def test_state_of_all_is_saved():
    cls = algorithm_class("adaptive_entropy+papo+dapo")
    first, second = cls(cls.Config()), cls(cls.Config())
    first.bonus = 0.03
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.bonus == 0.03


@pytest.mark.parametrize("name, message", [
    ("dapo+dapo", "'dapo\\+dapo' names a method twice"),
    ("dapo+megavg.algorithms.dapo", "names a method twice"),
    ("dapo+sft", "sft learns from written answers and cannot be joined"),
    ("gspo+cispo", "gspo and cispo each replace surrogate; name one of them"),
    ("dapo+gspo+kl_cov", "gspo and kl_cov each replace surrogate"),
    ("papo+vepo", "papo and vepo each replace perturbation"),
    ("saei+noisy_rollout", "saei and noisy_rollout each replace explore"),
    ("adaptive_entropy+ecvgpo", "adaptive_entropy and ecvgpo each have an option target_entropy of their own"),
    ("dapo+vepa", "'vepa' does not exist \\(did you mean 'vepo'\\?\\)"),
    ("dapo+", "'' does not exist \\(known: adaptive_entropy,"),
    ("dapo+no.such.module", "cannot import module 'no'"),
])
def test_what_cannot_be_joined_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**BASICS, "algorithm": {"name": name}})


class ShorterDAPO(DAPO):
    """DAPO with another default and an option. [ours]"""

    mark = "[ours]"

    @dataclass(frozen=True)
    class Config(DAPO.Config):
        """Options of the child.

        Attributes:
            factor: multiplies rewards.
        """

        overlong_cache: int = 5
        factor: float = 2.0

    def rewards(self, batch):
        """Rewards times ``factor``."""
        return self.config.factor * super().rewards(batch)


class OtherDAPO(DAPO):
    """A second child of DAPO. [ours]"""

    mark = "[ours]"


class OwnGSPO(GSPO):
    """GSPO whose surrogate is extended. [ours]"""

    def surrogate(self, new, signal):
        """Half of the parent's."""
        return super().surrogate(new, signal) / 2


def test_a_method_with_a_parent():
    batch, _ = random_batch()
    for names in (["dapo", "child"], ["child", "dapo"]):
        joined = compose(names, [{"dapo": DAPO, "child": ShorterDAPO}[name] for name in names])
        assert joined is ShorterDAPO, "the parent comes in with the child"
    siblings = compose(["child", "other"], [ShorterDAPO, OtherDAPO])
    config = siblings.Config()
    assert (config.overlong_cache, config.factor, config.clip_high) == (5, 2.0, 0.28)
    assert siblings.mark == "[ours]" and issubclass(siblings, ShorterDAPO) and issubclass(siblings, OtherDAPO)
    assert torch.allclose(siblings(config).rewards(batch), 2 * DAPO(DAPO.Config(overlong_cache=5)).rewards(batch))
    with_bonus = compose(["bonus", "child", "dapo"], [AdaptiveEntropy, ShorterDAPO, DAPO])
    assert with_bonus.Config().overlong_cache == 5 and with_bonus.Config().delta == 5e-3


def test_extending_what_the_parent_replaces_is_no_conflict():
    joined = compose(["dapo", "gspo", "own"], [DAPO, GSPO, OwnGSPO])
    assert joined.surrogate is OwnGSPO.surrogate


def test_joined_classes_share_nothing():
    """Joining leaves the methods as they were."""
    before = {cls: (dict(vars(cls)), cls.Config()) for cls in (Algorithm, DAPO, DrGRPO, ECVGPO, PAPO)}
    algorithm_class("papo+dapo+ecvgpo")
    for cls, (body, config) in before.items():
        assert dict(vars(cls)) == body and cls.Config() == config


def test_the_example_outside_of_the_package_is_on_the_path():
    assert (Path(__file__).resolve().parents[2] / "examples" / "custom_algorithm.py").is_file()
    assert algorithm_class("examples.custom_algorithm+dapo").__mro__[1].__name__ == "PositiveOnly"
