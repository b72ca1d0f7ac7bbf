"""Show a run in TensorBoard: scalars by room, histograms, pictures, texts and hyperparameters, in one event file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Mapping

import yaml

ROOMS = ("best", "reward", "eval", "entropy", "policy", "data", "time", "memory", "method")
"""The groups of scalars: "method" holds what only one algorithm reports; "best" is the first in the alphabet, as the
HParams tab shows the first five scalars."""

_ROOM_OF = {
    "iou": "reward", "self_information": "entropy", "jsd": "entropy", "loss": "policy", "gradient_norm": "policy",
    "lr": "policy", "kl": "policy", "rollout": "policy", "head": "policy", "selected": "policy", "response": "data",
    "resampling": "data", "tokens": "data", "tokens_per_second": "time"}

# Options by which runs are compared; None takes the whole section. Paths and limits of memory would drown them.
_COMPARED: dict[str, tuple[str, ...] | None] = {
    "algorithm": None, "optimizer": None, "rollout": None,
    "model": ("path", "dtype", "freeze_vision_tower", "freeze_projector"),
    "data": ("prompts_per_step", "thinking", "noise"),
    "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    "trainer": ("num_steps", "updates_per_batch", "seed")}


def tag(name: str) -> str:
    """Where a figure of metrics.jsonl stands in TensorBoard: "loss" is policy/loss, "iou/mean" is reward/iou_mean.

    A name that begins with a room keeps it; what no room knows is the algorithm's ("ecvgpo/alpha" is
    method/ecvgpo/alpha).
    """
    first = name.partition("/")[0]
    if first in ROOMS:
        return name
    return f"{_ROOM_OF[first]}/{name.replace('/', '_')}" if first in _ROOM_OF else f"method/{name}"


def hyperparameters(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the HParams tab compares of a resolved configuration: "section.option" -> number, flag or text."""
    found = {f"{section}.{key}": value for section, chosen in _COMPARED.items()
             for key, value in _leaves(tree.get(section, {})) if chosen is None or key.partition(".")[0] in chosen}
    return found | {"rewards": _plain(tree.get("rewards", []))}


class Board:
    """The event file of one process; steps from ``start_step`` + 1 on are written anew.

    A run that starts at step 0 begins with an empty folder, as its metrics.jsonl does.
    """

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        if not start_step:
            shutil.rmtree(folder, ignore_errors=True)
        self._start_step = start_step
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers among ``values``; they are in the file when this returns, as a run may be killed."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(tag(name), value, step)
        self._writer.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show a text."""
        self._writer.add_text(name, markdown, step)

    def picture(self, step: int, name: str, image) -> None:
        """Show a PIL image."""
        import numpy

        self._writer.add_image(name, numpy.asarray(image), step, dataformats="HWC")

    def histogram(self, step: int, name: str, values) -> None:
        """Show how the numbers of a tensor are distributed."""
        self._writer.add_histogram(name, values, step)

    def configuration(self, tree: Mapping[str, Any]) -> None:
        """Show the resolved configuration as a text, and what runs are compared by in the HParams tab.

        The tab takes every scalar as a metric, and the union of the options where several runs are looked at; a
        declared list would be that of one of them.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        # At the first step that this process takes, which a resumption of it takes again.
        text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
        self.text(self._start_step + 1, "config", "".join(f"    {line}\n" for line in text.splitlines()))
        self._writer.file_writer.add_summary(hparams_pb(hyperparameters(tree)))
        self._writer.flush()

    def close(self, finished: bool = False) -> None:
        """Write what is left; ``finished`` marks the run as a success in the HParams tab."""
        if finished:
            self._writer.file_writer.add_summary(_session_end())
        self._writer.close()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [
            (f"{prefix}{key}", _plain(value))]
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _session_end():
    """The summary that the HParams tab reads a success from; TensorBoard has no function for it without TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    content = HParamsPluginData(session_end_info=SessionEndInfo(status=api_pb2.STATUS_SUCCESS),
                                version=metadata.PLUGIN_DATA_VERSION)
    data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    return Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=data))])
