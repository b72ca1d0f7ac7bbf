"""What a reader of a data format hands to the shard builder: cheap drafts first, images later and in any process.

A reader is a module of this folder with a function ``read(...) -> Iterator[Draft]`` that goes through the annotations
alone and decodes no image. The builder cuts the drafts into shards by their number, so that what a shard holds does
not depend on how many processes build it, and calls :meth:`Draft.load` where the shard is written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from megavg.data.sample import SampleError, decode_image, read_size, sample_from_fields
from megavg.protocols.sample import Sample


class ImageSource(Protocol):
    """Where the encoded bytes of one picture come from; picklable, and equal for the same picture."""

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
    """A picture in a file of its own."""

    path: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def __str__(self) -> str:
        return self.path


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
    """

    where: str
    key: str
    image: ImageSource
    fields: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Sample:
        """Read the picture and check everything.

        Raises:
            SampleError: naming where the draft stands, its key and what is wrong.
        """
        try:
            data = self.image.read()
        except OSError as error:
            raise SampleError(self.where, self.key, "missing image",
                              f"{self.image}: {error.strerror or error}") from error
        name = f"{self.key}: {self.image}"
        fields = {**self.fields, "id": self.key}
        if "width" not in fields or "height" not in fields:
            fields["width"], fields["height"] = read_size(data, self.where, name)
        sample = sample_from_fields(fields, self.where, self.key)
        image = decode_image(data, sample.width, sample.height, self.where, name)
        return Sample(sample.key, "", image, sample.width, sample.height, sample.expression, sample.boxes_xyxy_px,
                      sample.meta, sample.task, sample.labels)


def key_from(*parts: object) -> str:
    """A key that shards accept, from names and numbers that make it unique together; folders and suffixes go."""
    words = [re.sub(r"[^A-Za-z0-9_]+", "_", os.path.splitext(os.path.basename(str(part)))[0]) for part in parts]
    return "-".join(word.strip("_")[:40] or "x" for word in words)[:92]
