"""Draw scenes of coloured shapes with exact boxes: as many samples as wanted, of chosen difficulty, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Iterator, Sequence

from PIL import Image, ImageDraw

from megavg.protocols.sample import Sample

COLOURS = {"red": (214, 32, 40), "green": (34, 150, 50), "blue": (30, 80, 200), "yellow": (235, 190, 0),
           "orange": (245, 120, 10), "purple": (130, 50, 160), "brown": (120, 72, 40), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "rectangle", "triangle", "diamond", "ring", "cross")

GAP = 2  # pixels between the boxes of two objects
_ALSO_CALLED = {"rectangle": ("rectangle", "square")}  # a reader may call a square a rectangle, too
_SIZE_RATIO = 1.25  # a size word needs both sides to differ by this factor
_POSITION_STEP = 0.1  # a position word needs the centres to differ by this share of the image
_TRIES = 200


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape; ``box`` is the tight box of its pixels (x0, y0, x1, y1), x1 and y1 exclusive."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]


def scenes(count: int, seed: int, size: int | tuple[int, int] = 96, min_objects: int = 1,
           max_objects: int = 1, **options) -> Iterator[Sample]:
    """Yield ``count`` scenes; scene i depends on (seed, i) and the options alone, whatever ``count`` is.

    ``options`` are those of ``draw_scene``.
    """
    for index in range(count):
        rng = random.Random(f"megavg.data.scenes/{seed}/{index}")
        yield draw_scene(rng, size, min_objects, max_objects, key=f"scene-{seed}-{index:08d}", **options)


def draw_scene(rng: random.Random, size: int | tuple[int, int] = 96, min_objects: int = 1, max_objects: int = 5,
               min_side: float | None = None, max_side: float | None = None, key: str = "scene",
               shapes: Sequence[str] = SHAPES, colours: Sequence[str] = tuple(COLOURS)) -> Sample:
    """Draw one scene whose expression names exactly one of its objects, such as "the red circle".

    Where several objects share colour and shape, the expression adds a size or position word, and only one that
    holds by a clear margin ("the smallest red circle", "the leftmost red circle").

    Args:
        rng: the only source of chance.
        size: width and height of the picture in pixels, one number for a square.
        min_objects, max_objects: range of the number of objects, both ends included.
        min_side, max_side: sides of an object as shares of the shorter side of the picture. Default: 0.25 and 0.5,
            divided by the square root of the number of objects, so that a crowd fits.
        key: of the sample.
        shapes, colours: what to choose from, out of ``SHAPES`` and ``COLOURS``.

    Raises:
        ValueError: options out of range, or objects too large to fit beside each other.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if not 1 <= min_objects <= max_objects:
        raise ValueError(f"min_objects={min_objects}, max_objects={max_objects}: expected 1 <= min <= max")
    if min(width, height) < 32:
        raise ValueError(f"size {width} x {height}: expected at least 32 pixels a side")
    for option, chosen, known in (("shapes", shapes, SHAPES), ("colours", colours, COLOURS)):
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"{option}={list(chosen)}: expected one or more of {', '.join(known)}")
    count = rng.randint(min_objects, max_objects)
    sides = _sides(min(width, height), count, min_side, max_side)
    for _ in range(_TRIES):
        image = Image.new("RGB", (width, height), tuple(rng.randint(205, 255) for _ in range(3)))
        objects = _place(rng, image, count, sides, shapes, colours)
        found = _choose_target(rng, objects, width, height) if objects else None
        if found:
            target, expression = found
            return _sample(key, image, expression, target, objects)
    raise ValueError(f"{count} objects with sides of {sides[0]} to {sides[1]} pixels do not fit beside each other into "
                     f"{width} x {height}; lower max_objects or max_side, or enlarge the picture")


def _sides(shorter: int, count: int, min_side: float | None, max_side: float | None) -> tuple[int, int]:
    """Range of an object's side in pixels."""
    low = 0.25 / count**0.5 if min_side is None else min_side
    high = 0.5 / count**0.5 if max_side is None else max_side
    if not 0 < low <= high <= 1:
        raise ValueError(f"min_side={low}, max_side={high}: expected shares of the picture, "
                         "0 < min_side <= max_side <= 1")
    return max(6, round(low * shorter)), max(6, round(high * shorter))


def _place(rng: random.Random, image: Image.Image, count: int, sides: tuple[int, int], shapes: Sequence[str],
           colours: Sequence[str]) -> list[SceneObject] | None:
    """Draw ``count`` objects apart from each other; None when one finds no room."""
    objects: list[SceneObject] = []
    while len(objects) < count:
        shape, colour = rng.choice(shapes), rng.choice(colours)
        width, height = _extent(rng, shape, sides)
        for _ in range(_TRIES):
            x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            if all(x + width + GAP <= o.box[0] or x >= o.box[2] + GAP or y + height + GAP <= o.box[1]
                   or y >= o.box[3] + GAP for o in objects):
                break
        else:
            return None
        mask = Image.new("1", image.size)
        _draw(ImageDraw.Draw(mask), shape, x, y, x + width - 1, y + height - 1)
        image.paste(COLOURS[colour], mask=mask)
        objects.append(SceneObject(shape, colour, mask.getbbox()))
    return objects


def _extent(rng: random.Random, shape: str, sides: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels: free for a triangle, clearly unequal for a rectangle, equal for the others."""
    low, high = sides
    side = rng.randint(low, high)
    if shape == "rectangle":
        other = max(3, round(side * rng.uniform(0.4, 0.7)))
        return (side, other) if rng.random() < 0.5 else (other, side)
    return (side, rng.randint(low, high)) if shape == "triangle" else (side, side)


def _draw(draw: ImageDraw.ImageDraw, shape: str, x0: int, y0: int, x1: int, y1: int) -> None:
    """Fill ``shape`` into the box of pixels x0..x1, y0..y1, ends included."""
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=1)
    elif shape == "ring":
        draw.ellipse((x0, y0, x1, y1), outline=1, width=max(2, (x1 - x0 + 1) // 5))
    elif shape in ("square", "rectangle"):
        draw.rectangle((x0, y0, x1, y1), fill=1)
    elif shape == "triangle":
        draw.polygon([(x0, y1), (x1, y1), (middle_x, y0)], fill=1)
    elif shape == "diamond":
        draw.polygon([(middle_x, y0), (x1, middle_y), (middle_x, y1), (x0, middle_y)], fill=1)
    else:
        arm = (x1 - x0 + 1) // 3
        draw.rectangle((x0 + arm, y0, x1 - arm, y1), fill=1)
        draw.rectangle((x0, y0 + arm, x1, y1 - arm), fill=1)


def _choose_target(rng: random.Random, objects: list[SceneObject], width: int,
                   height: int) -> tuple[SceneObject, str] | None:
    """An object and an expression that no other object answers to; None when none has one."""
    for target in rng.sample(objects, len(objects)):
        names = _ALSO_CALLED.get(target.shape, (target.shape,))
        peers = [o for o in objects if o is not target and o.colour == target.colour and o.shape in names]
        words = _words(target.box, [o.box for o in peers], width, height) if peers else [""]
        if words:
            word = rng.choice(words)
            return target, " ".join(part for part in ("the", word, target.colour, target.shape) if part)
    return None


def _words(box: tuple, others: list[tuple], width: int, height: int) -> list[str]:
    """Size and position words that hold for ``box`` against every one of ``others`` by a clear margin."""
    def sides(b: tuple) -> tuple[int, int]:
        return b[2] - b[0], b[3] - b[1]

    def centre(b: tuple, axis: int) -> float:
        return (b[axis] + b[axis + 2]) / 2 / (width, height)[axis]

    tests = {
        "largest": lambda o: all(a >= _SIZE_RATIO * b for a, b in zip(sides(box), sides(o))),
        "smallest": lambda o: all(b >= _SIZE_RATIO * a for a, b in zip(sides(box), sides(o))),
        "leftmost": lambda o: centre(o, 0) - centre(box, 0) >= _POSITION_STEP,
        "rightmost": lambda o: centre(box, 0) - centre(o, 0) >= _POSITION_STEP,
        "topmost": lambda o: centre(o, 1) - centre(box, 1) >= _POSITION_STEP,
        "bottommost": lambda o: centre(box, 1) - centre(o, 1) >= _POSITION_STEP,
    }
    return [word for word, holds in tests.items() if all(holds(other) for other in others)]


def _sample(key: str, image: Image.Image, expression: str, target: SceneObject, objects: list[SceneObject]) -> Sample:
    meta = {"source": "scenes", "num_objects": len(objects), "target": objects.index(target),
            "objects": [{"shape": o.shape, "colour": o.colour, "box_xyxy_px": list(o.box)} for o in objects]}
    box = tuple(float(edge) for edge in target.box)
    return Sample(key, "", image, image.width, image.height, expression, (box,), meta)
