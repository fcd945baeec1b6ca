"""One picture's file as numbers, as it is seen."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from engine import fingerprint
from engine.files import hash_json, one_line, remember

# What shops use. Others are refused: Pillow would start another program for some.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
READABLE = "readable"  # what is remembered of a picture without a fault
# What is remembered holds for this code and this Pillow.
LOOK = hash_json([fingerprint.SOURCES[__name__], PIL.__version__])[:8]
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """The picture, to be read within; ValueError names a file that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(f"picture {path} cannot be read ({one_line(error)}); download it again or "
                         "remove its row") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as it is seen: upright, 16-bit grey scaled, what is transparent on white, the first
    of an animated one. ValueError for a mode whose numbers have no agreed black and white. Shown
    in 05.
    """
    refuse_odd_numbers(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        numbers = np.asarray(picture).astype(np.uint32)
        grey = np.where(numbers == picture.info.get("transparency"), 255, numbers // 257)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode not in MODES:
        raise ValueError(f"its mode {picture.mode} has no agreed black and white")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def refuse_odd_numbers(picture: Image.Image) -> None:
    """ValueError for numbers that Pillow reads as other colours than those that are meant."""
    tags = getattr(picture, "tag_v2", None)
    if tags and picture.mode.startswith("I;16") and (
            tags.get(BITSPERSAMPLE) != (16,) or tags.get(PHOTOMETRIC_INTERPRETATION) == 0):
        raise ValueError("its 16-bit grey does not go from 0 for black to 65,535 for white")
    stored = [tile[3] for tile in getattr(picture, "tile", [])]
    if "transparency" in picture.info and any(bits in stored for bits in ("RGB;16B", "L;2", "L;4")):
        raise ValueError("its transparent colour is given in other bits than Pillow reads")


def decode_picture(path: str | Path, size: int) -> np.ndarray:
    """The picture as uint8 [3, size, size] RGB; ValueError names a file that cannot be read.

    Shown in 05.
    """
    with open_picture(path) as picture:
        small = as_rgb(picture).resize(
            (size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small).transpose(2, 0, 1)


def picture_faults(paths: Sequence[str]) -> list[str]:
    """What is wrong with each picture's file, "" if nothing; each is decoded once, and remembered.
    """
    def told(words: str, path: str) -> str:
        absent = f"picture {path} is absent, or a link out of its folder"
        return "" if words == READABLE else words or absent

    return [told(*pair) for pair in zip(remember(f"{READABLE}-{LOOK}", _look, paths), paths)]


def _look(path: str) -> str:
    try:
        decode_picture(path, 64)
    except ValueError as error:
        return str(error)
    return READABLE
