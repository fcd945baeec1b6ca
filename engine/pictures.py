"""Decoded pictures, from files or from the cache."""
from __future__ import annotations

import math
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine import fingerprint
from engine.files import cache_file, hash_json, one_line
from engine.progress import Progress, cores
from engine.rows import chosen_pictures, pictures_digest
from engine.runs import Run

# What shops use. Others are refused: Pillow would start another program for some.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
BLOCK = 64  # pictures that share a checksum
NPY_HEADER = 128  # bytes before the numbers in a NumPy file


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
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if picture.mode not in MODES:
        raise ValueError(f"its mode {picture.mode} has no agreed black and white")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def decode_picture(path: str | Path, size: int) -> np.ndarray:
    """The picture as uint8 [3, size, size] RGB; ValueError names a file that cannot be read.

    Shown in 05.
    """
    with open_picture(path) as picture:
        small = as_rgb(picture).resize(
            (size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small).transpose(2, 0, 1)


class DecodedPictures:
    """Pictures of `paths`, decoded each time they are asked for, indexed as an array's first axis.

    `pictures[i]` is uint8 [3, size, size]; a slice or positions give [n, 3, size, size].
    """

    def __init__(self, paths: Sequence[str], size: int):
        self.paths, self.dtype = list(paths), np.dtype(np.uint8)
        self.shape = (len(paths), 3, size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        positions = np.arange(len(self))[index]
        if positions.ndim == 0:
            return decode_picture(self.paths[positions], self.shape[-1])
        pictures = np.empty((len(positions), *self.shape[1:]), self.dtype)
        for i, picture in enumerate(self.decode(positions)):
            pictures[i] = picture
        return pictures

    def decode(self, positions: Iterable[int]) -> Iterator[np.ndarray]:
        """These pictures one by one, decoded on all processors."""
        with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            yield from pool.map(lambda i: self[int(i)], positions)


def cached_pictures(run: Run, size: int) -> np.ndarray | DecodedPictures:
    """uint8 [N, 3, size, size] of the run's products in order of product id, memory-mapped.

    Decoded once into the cache (150 kB a picture at 224 pixels); the file's name says which
    pictures it holds, and what its checksums call damaged is decoded again. With the setting
    `cache_pictures` off they are decoded each time they are asked for, and nothing is written.
    OSError if the disk has no room.
    """
    pictures = DecodedPictures(chosen_pictures(run)["picture"], size)
    if not run.profile.cache_pictures:
        return pictures
    code = fingerprint.code_of(decode_picture).hash
    name = hash_json([code, pictures_digest(run), size])[:16]
    path = cache_file(f"pictures-{name}.npy", partial(write_pictures, pictures))
    mend_pictures(path, pictures)
    return np.load(path, mmap_mode="r")


def mend_pictures(path: Path, pictures: DecodedPictures) -> None:
    """Decode again, with a warning, the pictures of a cache file whose checksums are not theirs."""
    about = path.stat()
    if about.st_size != cache_bytes(pictures.shape):
        warnings.warn(f"{path} is damaged: {about.st_size:,} bytes; its pictures are decoded again",
                      stacklevel=2)
        path.unlink()
        cache_file(path.name, partial(write_pictures, pictures))
    elif damaged := damaged_blocks(path, pictures.shape, about.st_mtime_ns):
        places = [np.arange(len(pictures))[BLOCK * block:BLOCK * (block + 1)] for block in damaged]
        warnings.warn(f"{path} is damaged: pictures {places[0][0]} to {places[0][-1]}"
                      f"{' and others' * (len(places) > 1)}; they are decoded again", stacklevel=2)
        cache, _ = open_cache(path, pictures.shape, "r+")
        for some in places:
            cache[some] = pictures[some]
        cache.flush()


def cache_bytes(shape: tuple[int, ...]) -> int:
    """The size of a cache file: NumPy's header, a byte a number, a checksum a block."""
    return NPY_HEADER + math.prod(shape) + 4 * math.ceil(shape[0] / BLOCK)


def open_cache(path: Path, shape: tuple[int, ...], mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, the CRC-32 of each block of them) of a cache file, memory-mapped.

    It is a NumPy file, after which the checksums stand.
    """
    blocks = math.ceil(shape[0] / BLOCK)
    pictures = np.memmap(path, np.uint8, mode, NPY_HEADER, shape)
    return pictures, np.memmap(path, "<u4", mode, cache_bytes(shape) - 4 * blocks, (blocks,))


@cache
def damaged_blocks(path: Path, shape: tuple[int, ...], mtime: int) -> list[int]:
    """The blocks of a cache file whose bytes are not those written; looked at once a process."""
    pictures, sums = open_cache(path, shape, "r")
    with ThreadPoolExecutor(cores()) as pool:  # zlib works outside the interpreter's lock
        found = pool.map(lambda block: checksum(pictures, block), range(len(sums)))
        return [block for block, (found, sum) in enumerate(zip(found, sums)) if found != sum]


def checksum(pictures: np.ndarray, block: int) -> int:
    """The CRC-32 of one block."""
    return zlib.crc32(pictures[BLOCK * block:BLOCK * (block + 1)])


def write_pictures(pictures: DecodedPictures, path: Path) -> None:
    """Decode all pictures into one NumPy file, and add checksums; OSError if the disk has no room.
    """
    needed, free = cache_bytes(pictures.shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the cache of decoded pictures needs {needed / 1e9:.2f} GB in {path.parent}, where "
            f"{free / 1e9:.2f} GB are free; free some disk space, or set cache_pictures=False, "
            "which decodes each picture in every epoch")
    np.lib.format.open_memmap(path, "w+", pictures.dtype, pictures.shape)
    with path.open("r+b") as file:
        file.truncate(needed)
    cache, sums = open_cache(path, pictures.shape, "r+")
    bar = Progress("decoding", len(pictures), "pictures")
    try:
        for i, picture in enumerate(bar.track(pictures.decode(range(len(pictures))))):
            cache[i] = picture
    finally:
        bar.close()
    sums[:] = [checksum(cache, block) for block in range(len(sums))]
    cache.flush()
    sums.flush()
