"""What a reader of a data format hands to the shard builder: cheap drafts first, images later and in any process.

A reader is a module of this folder with a function ``read(...) -> Iterator[Draft]`` that goes through the annotations
alone and decodes no image. The builder cuts the drafts into shards by their number, so that what a shard holds does
not depend on how many processes build it, and calls :meth:`Draft.load` where the shard is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megavg.data.readers.frames import PIXELS, boxes_to_px
from megavg.data.sample import SampleError, decode_image, read_size, sample_from_fields
from megavg.protocols.sample import Sample


MAX_KEY = 92  # characters, see megavg.data.sample


class ImageSource(Protocol):
    """Where the encoded bytes of one picture come from; picklable, and equal for the same picture.

    Attributes:
        path: the file that holds them; a build that continues looks whether it has changed.
    """

    path: str

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def __str__(self) -> str:
        """A name for messages."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """A picture in a regular file of its own; ``is_refused`` where it lies outside the folder it should be in."""

    path: str
    is_refused: bool = False

    def read(self) -> bytes:
        if self.is_refused:
            raise OSError("the annotations name a file outside the folder of the pictures; set image_root, or, where "
                          "you trust them, allow_outside (--allow-outside)")
        with open(self.path, "rb", opener=_open_regular) as file:
            return file.read()

    def __str__(self) -> str:
        return self.path


def _open_regular(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK)  # a named pipe is not waited for
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("not a regular file")
    return number


@dataclass(frozen=True)
class PictureFolder:
    """The folder that the names of pictures are relative to; they may leave it only with ``allow_outside``."""

    root: str
    allow_outside: bool = False

    def file(self, name: str) -> ImageFile:
        """The picture ``name``; its ``read`` refuses a name that "..", or its being absolute, leads out of the folder.

        Symbolic links are followed: who can place them in the folder can place pictures there.
        """
        path, inside = os.path.join(self.root, name), os.path.join(os.path.abspath(self.root), "")
        return ImageFile(path, not self.allow_outside and not os.path.abspath(path).startswith(inside))


@dataclass(frozen=True)
class Draft:
    """A sample whose picture has not been read and whose fields have not been checked yet.

    Attributes:
        where: file and place in it ("refs(unc).p: ref 17", "boxes.jsonl: line 3 object 1"), for messages.
        key: unique in the data set, from its own names and numbers, in the characters that shards accept.
        image: where the picture is.
        fields: of the record, see ``megavg.data.sample``: "expression", "boxes_xyxy_px", perhaps "task", "labels" and
            anything else for ``Sample.meta``. "width" and "height" may be missing where the format does not state
            them: they are then read from the picture.
        box_frame: the frame of the boxes in ``fields``, one of ``megavg.data.readers.frames.FRAMES``; ``load`` turns
            them into original pixels, because the size may be known only then.
        clip_px: boxes that leave the picture by at most so many pixels are cut at its edge.
        problem: (reason, detail) of a row that cannot become a sample: ``load`` raises it, so that the builder stops
            there or leaves it out and counts it, as its user chose. None for a row that reads well so far.
    """

    where: str
    key: str
    image: ImageSource
    fields: dict[str, Any] = field(default_factory=dict)
    box_frame: str = PIXELS
    clip_px: float = 0.0
    problem: tuple[str, str] | None = None

    def read(self) -> bytes:
        """The picture's bytes as stored.

        Raises:
            SampleError: "missing image", or the draft's own ``problem``.
        """
        if self.problem is not None:
            raise SampleError(self.where, self.key, *self.problem)
        try:
            return self.image.read()
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL, or that cannot be encoded
            raise SampleError(self.where, self.key, "missing image",
                              f"{self.image}: {getattr(error, 'strerror', None) or error}") from error

    def outline(self, data: bytes | None = None) -> Sample:
        """The checked sample without its picture (``image`` is None): boxes in pixels, overhang cut off.

        The picture is read only where the format does not state its size, and then not decoded.

        Raises:
            SampleError: as ``load``, less what only decoding shows.
        """
        if self.problem is not None:
            raise SampleError(self.where, self.key, *self.problem)
        fields = {**self.fields, "id": self.key}
        if "width" not in fields or "height" not in fields:
            fields["width"], fields["height"] = read_size(self.read() if data is None else data, self.where,
                                                          self._name())
        if "boxes_xyxy_px" in fields:
            fields["boxes_xyxy_px"] = boxes_to_px(fields["boxes_xyxy_px"], self.box_frame, fields["width"],
                                                  fields["height"], self.clip_px, self.where, self.key)
        return replace(sample_from_fields(fields, self.where, self.key), shard="")

    def load(self, data: bytes | None = None) -> Sample:
        """Read the picture (or take ``data``, what :meth:`read` gave) and check everything.

        Raises:
            SampleError: naming where the draft stands, its key and what is wrong.
        """
        data = self.read() if data is None else data
        sample = self.outline(data)
        return replace(sample, image=decode_image(data, sample.width, sample.height, self.where, self._name(),
                                                   check_orientation=True))

    def _name(self) -> str:
        return f"{self.key}: {self.image}"


def broken(where: str, key: str, reason: str, detail: str) -> Draft:
    """A draft for a row that cannot be read: its ``load`` raises ``SampleError(where, key, reason, detail)``."""
    return Draft(where, key, ImageFile(""), problem=(reason, detail))


def key_from(*parts: object) -> str:
    """A key that shards accept, from names and numbers that make it unique together; folders and suffixes go.

    A name is cut to 40 characters, and further, the longest first, until the key fits: numbers stay whole. Behind the
    last name that lost anything but its folder and ".json" stand 8 digits of a checksum of the whole names.
    """
    names = [os.path.basename(str(part)) for part in parts]
    words = [key_word(name) for name in names]
    lost = [place for place, name in enumerate(names) if name.removesuffix(".json") != words[place]]
    if sum(map(len, words)) + 9 + len(words) > MAX_KEY:  # any name may be cut further
        lost = [place for place, part in enumerate(parts) if not isinstance(part, int)]
    if lost:
        whole = "\0".join(names[place] for place in lost).encode(errors="backslashreplace")
        words.insert(lost[-1] + 1, hashlib.sha256(whole).hexdigest()[:8])
    while (excess := sum(map(len, words)) + len(words) - 1 - MAX_KEY) > 0:
        longest = max(range(len(words)), key=lambda place: len(words[place]))
        words[longest] = words[longest][:max(1, len(words[longest]) - excess, len(words[longest]) // 2)]
    return "-".join(words)


def key_word(name: str) -> str:
    """``name`` without folder and suffix, in at most 40 characters of a key: for keys that numbers make unique."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", os.path.splitext(os.path.basename(name))[0]).strip("_")[:40] or "x"
