"""Drawn scenes as drafts, so that many processes can draw them and the shards hold the same bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Iterator

from megavg.data.scenes import draw_scene
from megavg.protocols.sample import Sample


@dataclass(frozen=True)
class SceneDraft:
    """A scene that has not been drawn yet: ``fields`` are the options of ``draw_scene`` beside its chance and key.

    It has the attributes of ``megavg.data.readers.base.Draft``; ``image`` is None, as there is no file behind it.
    """

    where: str
    key: str
    chance: str
    fields: dict[str, Any] = field(default_factory=dict)
    image: None = None
    problem: None = None

    def load(self) -> Sample:
        """Draw the scene; raises ``ValueError`` where the options leave no room for its objects."""
        return draw_scene(random.Random(self.chance), key=self.key, **self.fields)


def read(count: int, seed: int = 0, image_size: int = 96, min_objects: int = 1, max_objects: int | None = None,
         min_side: float | None = None, max_side: float | None = None, shapes: list[str] | None = None,
         colours: list[str] | None = None) -> Iterator[SceneDraft]:
    """Drawn scenes of coloured shapes, each with an expression for exactly one of them.

    Draft i becomes the i-th of ``megavg.data.scenes.scenes(count, seed, ...)``.

    Args:
        count: number of scenes.
        image_size: side of a scene in pixels (default 96).
        min_objects: fewest objects in a scene (default 1).
        max_objects: most objects in a scene (default: as min_objects).
        min_side: smallest side of an object as a share of the picture.
        max_side: largest side of an object as a share of the picture.
        shapes: shapes to choose from, such as circle,square (default: all).
        colours: colours to choose from, such as red,blue (default: all).
    """
    chosen = {"min_side": min_side, "max_side": max_side, "shapes": shapes, "colours": colours}
    fields = {"size": image_size, "min_objects": min_objects,
              "max_objects": min_objects if max_objects is None else max_objects,
              **{name: value for name, value in chosen.items() if value is not None}}
    for index in range(count):
        # The names of chance and key are those of megavg.data.scenes.scenes; a test compares the two.
        yield SceneDraft(f"scene {index}", f"scene-{seed}-{index:08d}", f"megavg.data.scenes/{seed}/{index}", fields)
