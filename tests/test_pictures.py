"""Pictures: decoding, normalisation, augmentation, the encoder's size, the cache."""
import numpy as np
import pytest
import torch
from PIL import Image

import helpers as h


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


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode in ("L", "CMYK") else "x.png")
    Image.new("RGB", (30, 30), (128, 128, 128)).convert(mode).save(path)
    found = h.decode_picture(path, 16)
    assert found.shape == (3, 16, 16) and np.abs(found.astype(int) - 128).max() < 12


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "image_1_product_2.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image_1_product_2\.jpg cannot be read"):
        h.decode_picture(path, 16)


def test_picture_that_was_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 60).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        h.decode_picture(path, 16)


def test_normalise_against_numpy():
    pictures = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = h.normalise(pictures)
    for c, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):  # ImageNet
        expected = (pictures[:, c].numpy() / 255.0 - mean) / std
        assert np.allclose(found[:, c].numpy(), expected, atol=1e-5)
    assert found.dtype == torch.float32 and torch.equal(h.normalise(pictures[0]), found[0])


def test_augmentation_keeps_shape_and_type_and_follows_torchs_seed():
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
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
    assert rotate.degrees == [-15, 15] and flip.p == 0.5 and crop.scale == (0.8, 1.0) and crop.size == (64, 64)
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, :, :32] = 255
    torch.manual_seed(0)
    left = [augmented[:, 24:40, :16].float().mean() > 128 for augmented in map(h.augmentation(64), [picture] * 60)]
    assert 15 < sum(left) < 45  # half of them flipped


@torch.no_grad()
def test_small_encoder_gives_512_wide_vectors_of_pictures_and_of_single_tiles():
    encoder = h.ImageEncoder("small").eval()
    assert encoder.width == 512
    for side in (112, 64, 14, 4):
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, 512)
    pictures = torch.randn(2, 3, 64, 64)
    feature_map = encoder.model.features(pictures)
    by_hand = feature_map.numpy().reshape(2, 512, -1).mean(-1)
    assert np.allclose(encoder(pictures).numpy(), by_hand, atol=1e-5)


@torch.no_grad()
def test_full_size_encoder_is_se_resnext_50():
    encoder = h.ImageEncoder("se_resnext50_32x4d", weights=None).eval()
    classifier = h.Classifier(encoder, encoder.width)
    assert encoder.width == 2048
    assert sum(p.numel() for p in classifier.parameters()) == 25_566_219
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 2048)
    assert encoder(torch.randn(1, 3, 14, 14)).shape == (1, 2048)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="se_resnext51"):
        h.ImageEncoder("se_resnext51", weights=None)


def test_image_stage_saves_what_loads_into_the_encoder(make_run, tmp_path):
    run = make_run(image_size=32)
    h.split_stage(run)
    folder = h.image_encoder_stage(run)
    encoder = h.load_image_encoder(run)
    metrics = h.read_manifest(run, "seresnext")["metrics"]
    assert not encoder.training and metrics["best_epoch"] == 1
    assert metrics["parameters"] == sum(p.numel() for p in h.Classifier(encoder, 512).parameters())
    assert sorted(path.name for path in folder.iterdir()) == [
        "curve.csv", "encoder.safetensors", "head.safetensors", "manifest.json"]  # and no pickle
    moments = [value for name, value in encoder.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(moment == 2 for moment in moments)  # 44 rows in batches of 32: the statistics are those of training


def test_cache_equals_decoding_in_order_of_product_id_and_is_made_once(run, tiny_ens, tmp_path, monkeypatch):
    h.split_stage(run)
    found = h.cached_pictures(run, 24)
    products = h.load_catalogue(tiny_ens).set_index("product_id")
    ids = sorted(h.read_split(run)["product_id"])
    assert found.shape == (55, 3, 24, 24) and found.dtype == np.uint8
    for row, product in zip(found, ids):
        assert np.array_equal(row, h.decode_picture(products.loc[product, "picture"], 24))
    cache = tmp_path / "data" / "cache"
    assert len(list(cache.iterdir())) == 1 and not list(cache.glob("*.partial"))

    def refuse(*args, **kwargs):
        raise AssertionError("a picture was decoded again")

    monkeypatch.setattr(h, "decode_picture", refuse)
    assert np.array_equal(h.cached_pictures(run, 24), found)
    with pytest.raises(AssertionError, match="again"):
        h.cached_pictures(run, 25)


def test_cache_notices_a_picture_of_another_size(run, tiny_ens):
    h.split_stage(run)
    before = np.array(h.cached_pictures(run, 16))
    path = h.load_catalogue(tiny_ens).set_index("product_id").loc[h.read_split(run)["product_id"][3], "picture"]
    Image.new("RGB", (50, 50), (0, 255, 0)).save(path)
    changed = (h.cached_pictures(run, 16) != before).any((1, 2, 3))
    assert changed.nonzero()[0].tolist() == [3]


def test_failed_decoding_leaves_no_cache(run, tiny_ens, tmp_path):
    h.split_stage(run)
    picture = h.load_catalogue(tiny_ens).set_index("product_id").loc[h.read_split(run)["product_id"][0], "picture"]
    with open(picture, "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        h.cached_pictures(run, 16)
    assert list((tmp_path / "data" / "cache").iterdir()) == []
