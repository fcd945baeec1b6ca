"""Pictures: decoding, normalisation, augmentation, the cache."""
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import elsewhere
import helpers as h
from conftest import ROOT
from engine import files, fingerprint, picture_cache
from engine import pictures as pictures_room
from engine.files import cache_file
from engine.looks import Changed
from engine.rows import pictures_digest
from engine.runs import cache_folder


@pytest.fixture
def halves(tmp_path):
    """A picture of 120 x 80 pixels, red on the left, blue on the right."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, :60], pixels[:, 60:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


def test_decoded_picture_has_the_size_and_its_colours_in_place(halves):
    found = h.decode_picture(halves, 40)
    assert found.shape == (3, 40, 40) and found.dtype == np.uint8
    assert (found[0, :, :18] == 255).all() and (found[0, :, 22:] == 0).all()
    assert (found[1] == 0).all()
    assert (found[2, :, :18] == 0).all() and (found[2, :, 22:] == 255).all()


def written(picture: Image.Image, path: Path, **options) -> Path:
    picture.save(path, **options)
    return path


GREY = Image.new("RGB", (30, 30), (128, 128, 128))
RED = Image.new("RGB", (30, 30), (255, 0, 0))
# {(mode in the file, its format): what is written}. All that Pillow opens from these formats.
SEEN_AS_GREY = {
    ("L", "JPEG"): GREY.convert("L"), ("RGB", "JPEG"): GREY, ("CMYK", "JPEG"): GREY.convert("CMYK"),
    ("RGB", "WEBP"): GREY, ("RGB", "BMP"): GREY, ("RGB", "TIFF"): GREY,
    ("L", "TIFF"): GREY.convert("L"),
    ("CMYK", "TIFF"): GREY.convert("CMYK"), ("YCbCr", "TIFF"): GREY.convert("YCbCr"),
    ("RGBA", "TIFF"): GREY.convert("RGBA"),
    ("RGB", "PNG"): GREY, ("L", "PNG"): GREY.convert("L"), ("LA", "PNG"): GREY.convert("LA"),
    ("P", "PNG"): GREY.quantize(4), ("RGBA", "PNG"): GREY.convert("RGBA"), ("P", "GIF"): GREY,
    ("I;16", "PNG"): Image.fromarray(np.full((30, 30), 128 * 257, np.uint16)),
    ("I;16", "TIFF"): Image.fromarray(np.full((30, 30), 128 * 257, np.uint16)),
    ("I;16B", "TIFF"): Image.frombytes("I;16B", (30, 30), b"\x80\x80" * 900),
}
REFUSED = {("I", "TIFF"): Image.new("I", (30, 30), 128),
           ("F", "TIFF"): Image.new("F", (30, 30), 0.5),
           ("LAB", "TIFF"): Image.new("LAB", (30, 30), (128, 128, 128))}


@pytest.mark.parametrize("mode, kind", SEEN_AS_GREY)
def test_every_mode_shows_the_colour_that_was_meant(tmp_path, mode, kind):
    path = written(SEEN_AS_GREY[mode, kind], tmp_path / "x.jpg", format=kind)  # all named jpg
    with Image.open(path) as picture:
        assert picture.format == kind and picture.mode == mode
    found = h.decode_picture(path, 16)
    assert found.shape == (3, 16, 16) and np.abs(found.astype(int) - 128).max() < 5


@pytest.mark.parametrize("mode, kind", REFUSED)
def test_a_mode_without_an_agreed_white_is_refused_by_name(tmp_path, mode, kind):
    path = written(REFUSED[mode, kind], tmp_path / "x.tif", format=kind)
    with pytest.raises(ValueError, match=rf"x\.tif cannot be read \(its mode {mode} has no agreed"):
        h.decode_picture(path, 16)


def test_one_bit_is_black_and_white(tmp_path):
    for value, grey in ((0, 0), (1, 255)):
        for kind in ("PNG", "TIFF", "BMP"):
            path = written(Image.new("1", (30, 30), value), tmp_path / "x", format=kind)
            assert (h.decode_picture(path, 16) == grey).all()


def test_what_is_transparent_is_white_and_no_hidden_colour(tmp_path):
    hidden = RED.convert("RGBA")
    hidden.putalpha(0)
    palette = RED.convert("P")
    half = RED.convert("RGBA")
    half.putalpha(128)
    cases = [(hidden, {}, (255, 255, 255)), (hidden, {"format": "WEBP", "exact": True}, (255,) * 3),
             (palette, {"transparency": palette.getpixel((0, 0))}, (255, 255, 255)),
             (Image.merge("LA", [Image.new("L", (30, 30), 9), Image.new("L", (30, 30), 0)]), {},
              (255, 255, 255)),
             (RED, {"transparency": (255, 0, 0)}, (255, 255, 255)),
             (Image.fromarray(np.full((30, 30), 1000, np.uint16)), {"transparency": 1000},
              (255, 255, 255)),
             (Image.fromarray(np.full((30, 30), 1000, np.uint16)), {"transparency": 1001},
              (3, 3, 3)),
             (half, {}, (255, 127, 127)), (RED.convert("RGBA"), {}, (255, 0, 0))]
    for picture, options, colour in cases:
        path = written(picture, tmp_path / "x.png", **{"format": "PNG", **options})
        assert h.decode_picture(path, 16)[:, 8, 8].tolist() == list(colour)


@pytest.mark.parametrize("tag, value", [(262, 0), (258, 12)], ids=["white is 0", "12 bits"])
def test_grey_of_another_scale_is_refused_by_name(tmp_path, tag, value):
    """Pillow reads its numbers as they are: white came out black, or nearly so."""
    path = written(SEEN_AS_GREY["I;16", "TIFF"], tmp_path / "x.tif")
    (old,) = set(re.findall(struct.pack("<HHI", tag, 3, 1) + b"..\0\0", path.read_bytes(), re.S))
    path.write_bytes(path.read_bytes().replace(old, old[:8] + struct.pack("<HH", value, 0)))
    with Image.open(path) as picture:
        assert picture.mode == "I;16"
    with pytest.raises(ValueError, match=r"x\.tif cannot be read \(its 16-bit grey does not go"):
        h.decode_picture(path, 16)


@pytest.mark.parametrize("colours, bits, row", [(2, 16, b"\0\x09" * 24), (0, 4, b"\x11" * 4),
                                                (0, 2, b"\x55" * 2)])
def test_a_transparent_colour_of_other_bits_is_refused_by_name(tmp_path, colours, bits, row):
    """Pillow makes 8 bits of the numbers, not of the colour: what is hidden would be seen."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    transparent = struct.pack(">HHH", 9, 9, 9) if colours else struct.pack(">H", 1)
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colours, 0, 0, 0)),
        chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)),
        chunk(b"IEND", b"")]))
    with pytest.raises(ValueError, match=r"x\.png cannot be read \(its transparent colour"):
        h.decode_picture(path, 16)


def test_a_picture_is_upright_as_its_exif_says(tmp_path, halves):
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter, so that the right side is on top
    with Image.open(halves) as picture:
        path = written(picture, tmp_path / "turned.png", exif=exif)
    found = h.decode_picture(path, 40)
    assert (found[2, :18] == 255).all() and (found[0, 22:] == 255).all()


def test_the_first_picture_of_an_animation_counts(tmp_path):
    path = written(RED, tmp_path / "x.gif", save_all=True, append_images=[GREY], duration=100)
    assert h.decode_picture(path, 16)[:, 8, 8].tolist() == [255, 0, 0]
    one = written(RED.crop((0, 0, 1, 1)), tmp_path / "one.png")
    assert (h.decode_picture(one, 16) == np.array([255, 0, 0]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO"])
def test_another_format_is_refused_and_starts_no_program(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("was started"))
    path = written(GREY, tmp_path / "x.jpg", format=kind)
    with pytest.raises(ValueError, match=r"x\.jpg cannot be read \(.*download it again"):
        h.decode_picture(path, 16)


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "image_1_product_2.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image_1_product_2\.jpg cannot be read"):
        h.decode_picture(path, 16)


def test_errors_of_other_decoders_are_said_alike(tmp_path):
    """Pillow refuses a huge picture by an error that is no OSError."""
    Image.new("1", (13_500, 13_500)).save(tmp_path / "huge.png")
    (tmp_path / "empty.bmp").write_bytes(b"BM" + bytes(60))
    for name in ("huge.png", "empty.bmp"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\); download it again"):
            h.decode_picture(tmp_path / name, 16)


def test_picture_that_was_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 60).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        h.decode_picture(path, 16)


def test_normalise_against_numpy():
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=random)
    found = h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD)
    imagenet = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
    for c, (mean, std) in enumerate(imagenet):
        expected = (pictures[:, c].numpy() / 255.0 - mean) / std
        assert np.allclose(found[:, c].numpy(), expected, atol=1e-5)
    one = h.normalise(pictures[0], torch.tensor(h.IMAGENET_MEAN), torch.tensor(h.IMAGENET_STD))
    assert found.dtype == torch.float32 and torch.equal(one, found[0])


def test_augmentation_keeps_shape_and_type_and_follows_torchs_seed():
    random = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=random)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append([h.augmentation(64)(picture) for _ in range(3)])
    assert all(draw.shape == (3, 64, 64) and draw.dtype == torch.uint8 for draw in draws[0])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1]))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2]))
    assert not torch.equal(draws[0][0], draws[0][1])


def test_augmentation_rotates_flips_and_crops_by_what_the_study_says():
    _, rotate, flip, crop, _ = h.augmentation(64).transforms  # between them: to Pillow and back
    assert rotate.degrees == [-15, 15] and flip.p == 0.5
    assert crop.scale == (0.8, 1.0) and crop.size == (64, 64)
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, :, :32] = 255
    torch.manual_seed(0)
    augmented = map(h.augmentation(64), [picture] * 60)
    left = [change[:, 24:40, :16].float().mean() > 128 for change in augmented]
    assert 15 < sum(left) < 45  # half of them flipped


# --- the cache ------------------------------------------------------------------------------------
@pytest.fixture
def products(run, tiny_ens):
    """The run's products in order of their ids, from the catalogue itself."""
    table = h.load_catalogue(tiny_ens)
    described = table["description"].str.strip() != ""
    return table[described].sort_values("product_id", ignore_index=True)


def caches() -> list[Path]:
    return list(cache_folder().glob("pictures-*"))


def test_cache_equals_decoding_in_order_of_product_id_and_is_made_once(run, products, monkeypatch):
    found = h.cached_pictures(run, 24)
    assert found.shape == (55, 3, 24, 24) and found.dtype == np.uint8 and len(products) == 55
    for row, path in zip(found, products["picture"]):
        assert np.array_equal(row, h.decode_picture(path, 24))
    assert len(caches()) == 1

    def refuse(*args, **kwargs):
        raise AssertionError("a picture was decoded again")

    monkeypatch.setattr("engine.pictures.open_picture", refuse)
    assert np.array_equal(h.cached_pictures(run, 24), found)
    with pytest.raises(AssertionError, match="again"):
        h.cached_pictures(run, 25)


def test_cache_serves_every_split_and_seed_on_the_same_rows(run, make_run):
    for other in (run, make_run(split="80-20"), make_run(seed=1), make_run(clean="light")):
        h.cached_pictures(other, 16)
    assert len(caches()) == 1
    assert len(h.cached_pictures(make_run(rows="all"), 16)) == 60 and len(caches()) == 2


def test_cache_notices_a_picture_of_another_size(run, products):
    before = np.array(h.cached_pictures(run, 16))
    Image.new("RGB", (50, 50), (0, 255, 0)).save(products["picture"][3])
    changed = (h.cached_pictures(run, 16) != before).any((1, 2, 3))
    assert changed.nonzero()[0].tolist() == [3]


def test_cache_notices_another_content_of_the_same_name_size_and_time(run, products):
    before, path = np.array(h.cached_pictures(run, 16)), Path(products["picture"][3])
    about = path.stat()
    Image.new("RGB", (80, 80), (0, 255, 0)).save(path, quality=20)
    path.write_bytes(path.read_bytes().ljust(about.st_size, b"\0"))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    changed = (h.cached_pictures(run, 16) != before).any((1, 2, 3))
    assert changed.nonzero()[0].tolist() == [3] and len(caches()) == 2


def test_a_picture_is_hashed_once_until_it_changes(run, products, monkeypatch):
    read, hash_one = [], files.fast_hash
    monkeypatch.setattr(files, "fast_hash", lambda path: read.append(path) or hash_one(path))
    first = pictures_digest(run)
    assert len(read) == 55 and pictures_digest(run) == first and len(read) == 55
    files._remembered.cache_clear()  # as in another process
    assert pictures_digest(run) == first and len(read) == 55
    (Path(products["picture"][0]).parent / ".DS_Store").write_bytes(b"x")
    assert pictures_digest(run) == first and len(read) == 55
    Image.new("RGB", (9, 9)).save(products["picture"][0])
    assert pictures_digest(run) != first and len(read) == 56
    Path(products["picture"][1]).unlink()
    assert pictures_digest(run) != first and len(read) == 56


LOOKED_AT = """
import sys, PIL.Image
PIL.__version__ = sys.argv[1]
from engine import pictures
look, seen = pictures._look, []
pictures._look = lambda path: seen.append(path) or look(path)
assert not any(pictures.picture_faults(sys.argv[2:]))
print(len(seen))
"""


@pytest.mark.slow
def test_what_is_remembered_of_a_picture_is_asked_again_of_another_pillow(run, products):
    def looked_at(version: str) -> int:
        words = [sys.executable, "-c", LOOKED_AT, version, *products["picture"]]
        return int(subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout)

    assert [looked_at(version) for version in ("1.0", "1.0", "1.1", "1.1")] == [55, 0, 55, 0]


def decode_into(run: h.Run, place: Path) -> None:
    np.save(place, np.array(h.cached_pictures(run, 32)))


@pytest.mark.slow
def test_runs_at_once_share_one_cache(run, products, tmp_path, monkeypatch):
    """Each with a folder of its own for stages."""
    places, processes = [tmp_path / f"{i}.npy" for i in range(3)], []
    for place in places:
        monkeypatch.setenv("STUDY_RUNS", str(place.with_suffix("")))
        processes.append(elsewhere.start(decode_into, run, place))
    assert [elsewhere.ended(process) for process in processes] == [0, 0, 0]
    expected = np.stack([h.decode_picture(path, 32) for path in products["picture"]])
    assert all(np.array_equal(np.load(place), expected) for place in places)
    assert len(caches()) == 1 and not list(cache_folder().glob("*.partial"))


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("damage, said", [
    (lambda content: bytes(10_000) + content[10_000:], "pictures 0 to 54;"),
    (lambda content: content[:-4000] + bytes(3996) + content[-4:], "pictures 0 to 54;"),
    (lambda content: content[:-10_000] + bytes(10_000), "pictures 0 to 54;"),  # checksum and all
    (partial(flip, place=0), "pictures 0 to"), (partial(flip, place=200), "pictures 0 to"),
    (partial(flip, place=-1), "pictures 0 to"),  # of a checksum
    (lambda content: content[:1000], "1,000 bytes"), (lambda content: b"", "0 bytes")],
    ids=["begin zeroed", "zeroed", "end zeroed", "first bit", "one bit", "bit of a checksum",
         "cut off", "empty"])
def test_a_damaged_cache_is_named_and_mended(run, damage, said):
    before = np.array(h.cached_pictures(run, 16))
    (cache,) = caches()
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{cache.name} is damaged: {said}.* decoded again"):
        found = h.cached_pictures(run, 16)
    assert np.array_equal(found, before) and cache.read_bytes() == whole
    h.cached_pictures(run, 16)  # without a warning, which pytest would make an error


def test_one_block_is_mended_alone(run, monkeypatch):
    monkeypatch.setattr(picture_cache, "BLOCK", 10)
    before, decoded = np.array(h.cached_pictures(run, 16)), []
    (cache,) = caches()
    with cache.open("r+b") as file:
        file.seek(53 * 3 * 16 * 16)  # in the last block, of 5 pictures
        file.write(bytes(100))
    read = pictures_room.open_picture
    monkeypatch.setattr(pictures_room, "open_picture",
                        lambda path: decoded.append(path) or read(path))
    with pytest.warns(UserWarning, match="pictures 50 to 54; they are decoded again"):
        assert np.array_equal(h.cached_pictures(run, 16), before)
    assert len(decoded) == 5


def test_a_picture_that_changes_while_the_cache_is_written_leaves_no_cache(run, products,
                                                                           monkeypatch):
    write, path = picture_cache.write_pictures, Path(products["picture"][3])
    whole = path.read_bytes()

    def meanwhile(*args):
        Image.new("RGB", (80, 80), (0, 255, 0)).save(path)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(picture_cache, "write_pictures", meanwhile)
        with pytest.raises(Changed, match="the catalogue, or .* changed while .* start again"):
            h.cached_pictures(run, 16)
    assert not list(cache_folder().glob("pictures-*"))
    path.write_bytes(whole)
    assert np.array_equal(h.cached_pictures(run, 16)[3], h.decode_picture(path, 16))


@pytest.mark.parametrize("cache_pictures", [True, False])
def test_a_link_out_of_the_pictures_folder_is_not_followed(make_run, products, tmp_path,
                                                           cache_pictures):
    path = Path(products["picture"][3])
    path.rename(tmp_path / "elsewhere.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=f"1 of 55 pictures are absent.* {path.name}"):
        h.cached_pictures(make_run(cache_pictures=cache_pictures), 16)
    assert caches() == []


def test_cache_notices_another_way_of_decoding(run, monkeypatch):
    h.cached_pictures(run, 16)
    source = fingerprint.SOURCES["engine.pictures"]
    for old, new, expected in (("cannot be read (", "is not to be read (", 1),  # words only
                               ("Resampling.BILINEAR", "Resampling.BOX", 2)):
        assert source.count(old) == 1
        monkeypatch.setitem(fingerprint.SOURCES, "engine.pictures", source.replace(old, new))
        h.cached_pictures(run, 16)
        assert len(caches()) == expected


def test_failed_decoding_leaves_no_cache(run, products):
    Path(products["picture"][0]).write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        h.cached_pictures(run, 16)
    assert caches() == []


class Rows(torch.utils.data.Dataset):
    """Row i of an array of pictures."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return np.array(self.pictures[i])


@pytest.mark.slow
def test_pictures_decoded_each_time_are_the_cached_ones_in_worker_processes_too(make_run):
    decoded = h.cached_pictures(make_run(cache_pictures=False), 24)
    assert caches() == []
    cached = h.cached_pictures(make_run(), 24)
    assert decoded.shape == cached.shape and decoded.dtype == cached.dtype
    assert len(decoded) == len(cached)
    for index in (3, -1, slice(50, 60), slice(0, 0), np.array([7, 2, 2])):
        assert np.array_equal(decoded[index], cached[index])
    with pytest.raises(IndexError):
        decoded[len(decoded)]
    for pictures in (decoded, cached):
        loader = torch.utils.data.DataLoader(Rows(pictures), batch_size=20, num_workers=2)
        assert np.array_equal(torch.cat(list(loader)).numpy(), cached)


def test_full_disk_is_noticed_before_the_cache_is_begun(run, monkeypatch):
    free = namedtuple("Usage", "free")(20_000_000)
    monkeypatch.setattr("engine.picture_cache.shutil.disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"needs 0\.03 GB in .*0\.02 GB are free.*"
                                      "cache_pictures=False"):
        h.cached_pictures(run, 400)
    assert caches() == []
    rest = cache_folder() / "a.npy.partial"
    rest.write_bytes(b"of a kill")
    cache_file("a.npy", lambda path: path.write_text(str(path.exists())))
    assert rest.with_suffix("").read_text() == "False"  # gone before the new one asks for room
    assert h.cached_pictures(run, 40).shape == (55, 3, 40, 40)
