"""Decoded pictures, from files or from the cache."""
from __future__ import annotations

import math
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL

from engine import fingerprint
from engine.catalogue import check_pictures
from engine.files import cache_file, hash_json
from engine.looks import once, one_look, refuse_changed
from engine.pictures import decode_picture
from engine.progress import Progress, in_threads
from engine.rows import chosen_pictures, pictures_digest
from engine.runs import Run

BLOCK = 64  # pictures that share a checksum


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
        return in_threads(lambda i: self[int(i)], positions)


@one_look()
def cached_pictures(run: Run, size: int) -> np.ndarray | DecodedPictures:
    """uint8 [N, 3, size, size] of the run's products in order of product id, memory-mapped.

    Decoded once into the cache (150 kB a picture at 224 pixels); the file's name says which
    pictures it holds, and what its checksums call damaged is decoded again. With the setting
    `cache_pictures` off they are decoded each time they are asked for, and nothing is written.
    OSError if the disk has no room; ValueError if a picture is absent; Changed if one changes
    meanwhile.
    """
    chosen = chosen_pictures(run)
    check_pictures(chosen)
    pictures = DecodedPictures(chosen["picture"], size)
    if not run.profile.cache_pictures:
        return pictures
    code = fingerprint.code_of(decode_picture).hash
    name = hash_json([code, PIL.__version__, once(pictures_digest, run), size])[:16]
    unchanged = partial(refuse_changed, pictures_digest, run)  # the name says what it holds

    def write(path: Path) -> None:
        write_pictures(pictures, path)
        unchanged()

    path = cache_file(f"pictures-{name}.bin", write)
    if path.stat().st_size != cache_bytes(pictures.shape):
        warnings.warn(f"{path} is damaged: {path.stat().st_size:,} bytes; its pictures are decoded "
                      "again", stacklevel=2)
        path.unlink()
        cache_file(path.name, write)
    mend_pictures(path, pictures, unchanged)
    return open_cache(path, pictures.shape, "r")[0]


def mend_pictures(path: Path, pictures: DecodedPictures, unchanged: Callable[[], None]) -> None:
    """Decode again, with a warning, the pictures of a cache file whose checksums are not theirs,
    unless `unchanged` refuses.
    """
    damaged = damaged_blocks(path, pictures.shape, path.stat().st_mtime_ns)
    if not damaged:
        return
    places = [np.arange(len(pictures))[BLOCK * block:BLOCK * (block + 1)] for block in damaged]
    warnings.warn(f"{path} is damaged: pictures {places[0][0]} to {places[0][-1]}"
                  f"{' and others' * (len(places) > 1)}; they are decoded again", stacklevel=2)
    decoded = {block: pictures[some] for block, some in zip(damaged, places)}
    unchanged()
    cache, sums = open_cache(path, pictures.shape, "r+")
    for block, some in zip(damaged, places):
        cache[some] = decoded[block]
        sums[block] = checksum(cache, block)
    cache.flush()
    sums.flush()


def cache_bytes(shape: tuple[int, ...]) -> int:
    """The size of a cache file: a byte a number, then a checksum a block."""
    return math.prod(shape) + 4 * math.ceil(shape[0] / BLOCK)


def open_cache(path: Path, shape: tuple[int, ...], mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, the CRC-32 of each block of them) of a cache file, memory-mapped."""
    pictures = np.memmap(path, np.uint8, mode, 0, shape)
    return pictures, np.memmap(path, "<u4", mode, pictures.nbytes, (math.ceil(shape[0] / BLOCK),))


@cache
def damaged_blocks(path: Path, shape: tuple[int, ...], mtime: int) -> list[int]:
    """The blocks of a cache file whose bytes are not those written; looked at once a process."""
    pictures, sums = open_cache(path, shape, "r")
    found = in_threads(lambda block: checksum(pictures, block), range(len(sums)))
    return [block for block, (found, sum) in enumerate(zip(found, sums)) if found != sum]


def checksum(pictures: np.ndarray, block: int) -> int:
    """The CRC-32 of one block."""
    return zlib.crc32(pictures[BLOCK * block:BLOCK * (block + 1)])


def write_pictures(pictures: DecodedPictures, path: Path) -> None:
    """Decode all pictures into one file, and add checksums; OSError if the disk has no room."""
    needed, free = cache_bytes(pictures.shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the cache of decoded pictures needs {needed / 1e9:.2f} GB in {path.parent}, where "
            f"{free / 1e9:.2f} GB are free; free some disk space, or set cache_pictures=False, "
            "which decodes each picture in every epoch")
    with path.open("wb") as file:
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
