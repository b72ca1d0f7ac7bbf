"""Open the picture of a draft once and keep it: its bytes are stored as they are, its pixels cut or encoded anew."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from megavg.data.readers.base import Draft
from megavg.data.sample import SampleError, decode_image, read_size

_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Picture:
    """A completely decoded picture beside its own bytes; ``suffix`` says which kind these are."""

    data: bytes
    image: Image.Image
    suffix: str


def open_picture(draft: Draft) -> Picture:
    """Read and decode the picture of ``draft``.

    Raises:
        SampleError: "missing image", "broken image", "rotated picture", or the draft's own problem.
    """
    data = draft.read()
    try:
        image = decode_image(data, *read_size(data, draft.where, draft.key), draft.where, draft.key,
                             check_orientation=True)
    except SampleError as error:
        raise SampleError(draft.where, draft.key, error.reason, f"{draft.image}: {error.detail}") from error
    with Image.open(io.BytesIO(data)) as opened:
        return Picture(data, image, _SUFFIXES[opened.format])
