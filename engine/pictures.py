"""Decoded pictures, from files or from the cache."""
from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from engine import fingerprint
from engine.files import cache_file, hash_json, one_line
from engine.progress import Progress, cores
from engine.rows import chosen_pictures, pictures_digest
from engine.runs import Run


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """The picture, to be read within; ValueError names a file that cannot be read."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(f"picture {path} cannot be read ({one_line(error)}); download it again or "
                         "remove its row") from error


def decode_picture(path: str | Path, size: int) -> np.ndarray:
    """The picture as uint8 [3, size, size] RGB; ValueError names a file that cannot be read.

    Shown in 05.
    """
    with open_picture(path) as picture:
        small = picture.convert("RGB").resize(
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
    pictures it holds. With the setting `cache_pictures` off they are decoded each time they are
    asked for, and nothing is written. OSError if the disk has no room.
    """
    pictures = DecodedPictures(chosen_pictures(run)["picture"], size)
    if not run.profile.cache_pictures:
        return pictures
    code = fingerprint.code_of(decode_picture).hash
    name = hash_json([code, pictures_digest(run), size])[:16]
    path = cache_file(f"pictures-{name}.npy", partial(write_pictures, pictures))
    return np.load(path, mmap_mode="r")


def write_pictures(pictures: DecodedPictures, path: Path) -> None:
    """Decode all pictures into one NumPy file; OSError if the disk has no room."""
    needed, free = math.prod(pictures.shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the cache of decoded pictures needs {needed / 1e9:.2f} GB in {path.parent}, where "
            f"{free / 1e9:.2f} GB are free; free some disk space, or set cache_pictures=False, "
            "which decodes each picture in every epoch")
    cache = np.lib.format.open_memmap(path, "w+", pictures.dtype, pictures.shape)
    bar = Progress("decoding", len(pictures), "pictures")
    try:
        for i, picture in enumerate(bar.track(pictures.decode(range(len(pictures))))):
            cache[i] = picture
    finally:
        bar.close()
    cache.flush()
