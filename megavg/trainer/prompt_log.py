"""Ask with the run's prompts, and keep what was asked: once in the log, and whole in the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterable

from megavg.data.prompts import THINK, Prompts
from megavg.models.processor import Processor
from megavg.protocols.sample import Sample


class PromptLog:
    """Says the exact text of a task's prompt when its first sample comes, and the whole text of the first prompt.

    Args:
        say: takes a line for the log.
    """

    def __init__(self, prompts: Prompts, processor: Processor, say: Callable[[str], None]):
        self.prompts, self.processor, self._say = prompts, processor, say
        self._told: set[str] = set()

    def question(self, sample: Sample) -> str:
        """The text that goes with the image of ``sample``."""
        return self.prompts.question(sample)

    def tell(self, samples: Iterable[Sample]) -> None:
        """Say what is new in these samples, which have been encoded."""
        for sample in samples:
            if sample.task in self._told:
                continue
            first = not self._told
            self._told.add(sample.task)
            self._say(f"prompt of {sample.task} ({self.prompts.sources[sample.task]}): "
                      f"{self.prompts.texts[sample.task]!r}")
            if first:
                self._say(f"the first prompt as the model reads it, {sample.key}: "
                          f"{self.processor.rendered(self.question(sample))!r}")


def write_prompts(prompts: Prompts, path: Path) -> None:
    """Write every text to ``path``, a YAML file that ``data.prompts_file`` reads again; beside first, then renamed."""
    import yaml

    parts = ["# What the model of this run is asked; data.prompts_file takes such a file.\n"]
    for task, text in prompts.texts.items():
        named = {task + (THINK if prompts.thinking else ""): text}
        parts.append(f"# {prompts.sources[task]}\n" + yaml.safe_dump(named, allow_unicode=True, width=110))
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(parts), encoding="utf-8")
    os.replace(partial, path)
