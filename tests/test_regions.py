"""Regions: tiles against slicing, and P of equation (2) against a loop over the tiles."""
import pytest
import torch
from safetensors.torch import save_file

import helpers as h


def test_tiles_equal_slices_row_by_row():
    pictures = torch.arange(2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
    tiles = h.split_regions(pictures, 4)
    assert tiles.shape == (2, 16, 3, 3, 3)
    for row in range(4):
        for column in range(4):
            slice_ = pictures[:, :, 3 * row:3 * row + 3, 3 * column:3 * column + 3]
            assert torch.equal(tiles[:, 4 * row + column], slice_)


def test_the_papers_picture_gives_256_tiles_of_14_pixels():
    pictures = torch.rand(1, 3, 224, 224)
    tiles = h.split_regions(pictures)
    assert tiles.shape == (1, 256, 3, 14, 14)
    assert torch.equal(tiles[0, 0], pictures[0, :, :14, :14])
    assert torch.equal(tiles[0, 255], pictures[0, :, 210:, 210:])
    # Nothing is lost, nothing stands there twice.
    assert tiles.mean().item() == pytest.approx(pictures.mean().item(), rel=1e-5)


@pytest.mark.parametrize("height, width", [(225, 224), (224, 225), (15, 15)])
def test_picture_that_does_not_divide_is_refused(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels.*16 x 16"):
        h.split_regions(torch.zeros(1, 3, height, width))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    return h.ImageEncoder("small").eval()


def loop_over_tiles(encoder, pictures, grid):
    side, means = pictures.shape[-1] // grid, []
    for picture in pictures:
        vectors = [encoder(picture[None, :, top:top + side, left:left + side])[0]
                   for top in range(0, grid * side, side) for left in range(0, grid * side, side)]
        means.append(sum(vectors) / len(vectors))
    return torch.stack(means)


@torch.no_grad()
@pytest.mark.parametrize("grid, side", [(4, 56), (2, 28)])
def test_regional_features_equal_a_loop(encoder, grid, side):
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=draw)
    expected = loop_over_tiles(encoder, pictures, grid)
    found = h.regional_features(encoder, pictures, grid)
    assert found.shape == (3, 512)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    whole = encoder(pictures)  # another vector
    assert (whole - found).abs().mean() > 0.01 * found.abs().mean()


@pytest.fixture
def encoded(make_run, fake_stage):
    """A function that makes a run whose `seresnext` stage holds random weights, with nothing
    trained.
    """
    def build(run, name, folder):
        torch.manual_seed(0)
        save_file(h.ImageEncoder("small").state_dict(), folder / "encoder.safetensors")

    def prepare(**settings):
        run = make_run(image_size=32, region_size=48, grid=4, image_batch=7, **settings)
        fake_stage("seresnext", build)
        h.stage(run, "splits")
        h.stage(run, "seresnext")
        return run

    return prepare


def features(run, name):
    ids = h.read_split(run)["product_id"]
    return h.load_tensors(h.stage(run, name) / "features.safetensors", ids)["features"]


@torch.no_grad()
def test_stage_image_regions_holds_P_of_every_product(encoded):
    run = encoded()
    found, network = features(run, "image_regions"), h.load_image_encoder(run)
    pictures = torch.tensor(h.cached_pictures(run, 48)[:5])
    assert found.shape == (55, 512)
    assert torch.allclose(found[:5], loop_over_tiles(network, pictures, 4), rtol=1e-3, atol=1e-4)
    assert h.read_manifest(run, "image_regions")["metrics"] == {"width": 512}


@torch.no_grad()
def test_feature_map_is_the_average_of_whole_pictures(encoded):
    run = encoded(regions="feature_map")
    whole, network = features(run, "image_whole"), h.load_image_encoder(run)
    pictures = torch.tensor(h.cached_pictures(run, 32)[:5])
    assert torch.allclose(whole[:5], network(pictures), rtol=1e-3, atol=1e-4)
    assert torch.equal(features(run, "image_regions"), whole)
