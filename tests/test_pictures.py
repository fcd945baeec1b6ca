"""Pictures: decoding, normalisation, augmentation, backbones and their weights, the cache."""
import functools
import hashlib
import http.server
import pickle
import re
import threading
from collections import namedtuple

import huggingface_hub
import numpy as np
import pretrainedmodels
import pretrainedmodels.utils
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

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


def test_errors_of_other_decoders_are_said_alike(tmp_path):
    """Pillow refuses a huge picture by an error that is no OSError."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
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
    pictures = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD)
    for c, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):  # ImageNet
        expected = (pictures[:, c].numpy() / 255.0 - mean) / std
        assert np.allclose(found[:, c].numpy(), expected, atol=1e-5)
    assert found.dtype == torch.float32 and torch.equal(
        h.normalise(pictures[0], torch.tensor(h.IMAGENET_MEAN), torch.tensor(h.IMAGENET_STD)), found[0])


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


def some_pictures(n, side):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_small_encoder_gives_512_wide_vectors_of_pictures_and_of_single_tiles():
    encoder = h.ImageEncoder("small").eval()
    assert encoder.width == 512 and encoder.weights_from == "random weights"
    for side in (112, 64, 14, 4):
        assert encoder(some_pictures(2, side)).shape == (2, 512)
    pictures = some_pictures(2, 64)
    feature_map = encoder.model.features(h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD))
    by_hand = feature_map.numpy().reshape(2, 512, -1).mean(-1)
    assert np.allclose(encoder(pictures).numpy(), by_hand, atol=1e-5)
    assert torch.equal(encoder(pictures.float()), encoder(pictures))


def test_what_prepares_the_pictures_is_not_saved_with_the_weights():
    with torch.device("meta"):
        encoder = h.ImageEncoder("small")
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"model"}
    assert {name for name, _ in encoder.named_buffers() if "." not in name} == {"mean", "std"}


@torch.no_grad()
def test_full_size_encoder_is_se_resnext_50():
    encoder = h.ImageEncoder("se_resnext50_32x4d").eval()
    classifier = h.Classifier(encoder, encoder.width)
    assert encoder.width == 2048
    assert sum(p.numel() for p in classifier.parameters()) == 25_566_219
    assert encoder(some_pictures(1, 64)).shape == (1, 2048)
    assert encoder(some_pictures(1, 14)).shape == (1, 2048)


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name, width, parameters, mean, size, tiles", [
    ("se_resnext50_32x4d", 2048, 25_510_896, h.IMAGENET_MEAN, 224, True),
    ("xception", 2048, 20_806_952, HALF, 299, True),
    ("resnext101_32x4d", 2048, 42_128_704, h.IMAGENET_MEAN, 224, True),
    ("squeezenet1_1", 512, 722_496, h.IMAGENET_MEAN, 224, False),
    ("torchvision/resnet50", 2048, 23_508_032, h.IMAGENET_MEAN, 224, True),
    ("torchvision/convnext_tiny", 768, 27_820_128, h.IMAGENET_MEAN, 224, False),
    ("torchvision/vit_b_16", 768, 85_798_656, h.IMAGENET_MEAN, 224, False),
    ("torchvision/regnet_y_400mf", 440, 3_903_144, h.IMAGENET_MEAN, 224, True),
    ("torchvision/efficientnet_b0", 1280, 4_007_548, h.IMAGENET_MEAN, 224, True),
    ("timm/resnet18", 512, 11_176_512, h.IMAGENET_MEAN, 224, True),
    ("timm/convnext_atto", 320, 3_374_520, h.IMAGENET_MEAN, 224, False),
    ("timm/vit_tiny_patch16_224", 192, 5_524_416, HALF, 224, False),
    ("timm/efficientnet_b0", 1280, 4_007_548, h.IMAGENET_MEAN, 224, True),
    ("timm/mobilenetv3_small_100.lamb_in1k", 1024, 1_517_856, h.IMAGENET_MEAN, 224, True)])
def test_width_constants_and_size_come_from_the_network_itself(name, width, parameters, mean, size, tiles):
    encoder = h.shape_of_encoder(name)
    assert encoder.width == width and sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.expects.size == size and tuple(encoder.expects.mean) == pytest.approx(mean)
    assert h.refusal(encoder, size) == "" and (h.refusal(encoder, 14) == "") == tiles


@pytest.mark.parametrize("name", ["bninception", "inceptionv4", "dpn68"])  # BGR from 0 to 255, other constants
def test_pictures_are_prepared_as_pretrainedmodels_does(name):
    settings = pretrainedmodels.pretrained_settings[name]["imagenet"]
    assert (settings["input_space"], settings["input_range"][1]) == (("BGR", 255) if name == "bninception"
                                                                      else ("RGB", 1))
    prepare = torchvision.transforms.Compose([
        torchvision.transforms.ToTensor(), pretrainedmodels.utils.ToSpaceBGR(settings["input_space"] == "BGR"),
        pretrainedmodels.utils.ToRange255(settings["input_range"][1] == 255),
        torchvision.transforms.Normalize(settings["mean"], settings["std"])])
    encoder, (picture,) = h.ImageEncoder(name), some_pictures(1, 20)
    encoder.model = torch.nn.Identity()
    expected = prepare(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    assert torch.allclose(encoder(picture[None])[0], expected.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_inceptions_prepare_pictures_as_with_their_own_weights(name, monkeypatch):
    """torchvision switches a change of the input on where it loads the weights itself."""
    monkeypatch.setattr(torchvision.models.get_model_weights(name), "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    with torch.device("meta"):
        own = torchvision.models.get_model(name, weights="DEFAULT")
    assert own.transform_input and h.shape_of_encoder(f"torchvision/{name}").model.transform_input


@pytest.mark.parametrize("name, close", [
    ("se_resnext51_32x4d", "se_resnext50_32x4d"), ("timm/resnet1", "timm/resnet18"),
    ("convnext_tiny", "torchvision/convnext_tiny"), ("zzz", "examples: ")])
def test_unknown_encoder_is_named_with_a_few_close_names(name, close):
    with pytest.raises(ValueError, match=rf"unknown image encoder '{name}'.*{close}") as error:
        h.ImageEncoder(name)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("settings, message", [
    ({"seresnext": "torchvision/vit_b_16"}, "cannot take 14 x 14 tiles .*; set regions=feature_map"),
    ({"seresnext": "timm/convnext_atto"}, "cannot take 14 x 14 tiles .*; set regions=feature_map"),
    ({"seresnext": "timm/vit_tiny_patch16_224", "image_size": 80, "regions": "feature_map"},
     "cannot take pictures of 80 x 80 pixels .*; set image_size=224"),
    ({"seresnext": "timm/vit_tiny_patch16_224", "regions": "feature_map"}, ""),
    ({"seresnext": "timm/convnext_atto", "grid": 4}, ""), ({"seresnext": "torchvision/resnet50"}, ""), ({}, "")])
def test_network_that_cannot_take_pictures_or_tiles_is_refused(settings, message):
    profile = h.make_profile("paper", settings)
    if message:
        with pytest.raises(ValueError, match=f"^{settings['seresnext']} {message}"):
            h.check_image_encoder(profile)
    else:
        h.check_image_encoder(profile)


def test_image_stage_refuses_such_a_network_before_it_begins(make_run):
    run = make_run(seresnext="timm/convnext_atto", region_size=224, image_size=224)
    with pytest.raises(ValueError, match="14 x 14 tiles"):
        h.image_encoder_stage(run)
    assert not run.folder.exists()


# --- weights ------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_local_file_with_a_1000_class_head_gives_the_networks_own_features(tmp_path, suffix):
    network, path = torchvision.models.squeezenet1_1().eval(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    pictures = some_pictures(2, 64)
    expected = network.features(h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD)).mean((2, 3))
    for name in ("torchvision/squeezenet1_1", "squeezenet1_1"):
        encoder = h.ImageEncoder(name, str(path)).eval()
        assert encoder.weights_from == f"file {path}"
        assert torch.allclose(encoder(pictures), expected, rtol=1e-4, atol=1e-5)


def test_local_file_is_found_from_the_projects_root(tmp_path, monkeypatch):
    monkeypatch.setattr(h, "ROOT", tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    assert h.load_weights("small", "x.safetensors")[1] == "file x.safetensors"


def test_densenets_file_with_its_old_names_fits(tmp_path):
    network = torchvision.models.densenet121()
    old = {re.sub(r"(denselayer\d+)\.(norm|conv)([12])", r"\1.\2.\3", key): x
           for key, x in network.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    encoder = h.ImageEncoder("torchvision/densenet121", str(tmp_path / "densenet.pth"))
    found = encoder.model.features.denseblock1.denselayer1.conv2.weight
    assert torch.equal(found, network.features.denseblock1.denselayer1.conv2.weight)


def test_weights_that_do_not_fit_are_named(tmp_path):
    own = h.ImageEncoder("small").model.state_dict()
    first, *rest = own
    for weights, message in [
            ({key: own[key] for key in rest}, rf"1 missing \({first}\)"),
            ({**own, "more.weight": torch.ones(27, 5)}, r"1 unexpected \(more.weight\)"),
            ({**own, first: torch.ones(3, 4)}, rf"1 wrong shape \({first} \[3, 4\] instead of \[16, 3, 7, 7\]\)")]:
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="do not fit small .*" + message):
            h.ImageEncoder("small", str(tmp_path / "w.safetensors"))


def test_a_published_file_brought_by_hand_is_checked_by_its_name(tmp_path):
    weights = h.ImageEncoder("torchvision/resnet18").model.state_dict()
    right = h.file_name(h.published_url("torchvision/resnet18"))
    for name in (right, "mine-20240101.pth"):
        torch.save(weights, tmp_path / name)
    with pytest.raises(ValueError, match="its sha256 begins with [0-9a-f]{8}, not as its name says"):
        h.ImageEncoder("torchvision/resnet18", str(tmp_path / right))
    assert h.ImageEncoder("torchvision/resnet18", str(tmp_path / "mine-20240101.pth")).weights_from.endswith(".pth")


class Intruder:
    """A pickle that makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_file_that_holds_code_is_refused_and_the_code_does_not_run(tmp_path):
    for name, write in [("a.pth", lambda value, path: torch.save({"x": value}, path)),
                        ("b.pt", lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)))]:
        write(Intruder(tmp_path / "made"), tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: it is damaged, or holds more than tensors"):
            h.ImageEncoder("small", str(tmp_path / name))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name, content, message", [
    ("gone.pth", None, "there is no such file"), ("cut.safetensors", b"12345", "it is damaged"),
    ("empty.pth", b"", "it is damaged"), ("list.pth", [1, 2], "it does not hold a state dict")])
def test_file_that_is_no_state_dict_is_refused(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"no usable weights for small .*{name}: {message}.*image_weights=<file>"):
        h.ImageEncoder("small", str(tmp_path / name))


def test_mirrors_weights_are_those_of_pretrainedmodels_network(tmp_path):
    """timm's legacy network, whose weights the model hub holds, and pretrainedmodels' have one state dict."""
    network = timm.create_model("legacy_seresnext50_32x4d").eval()
    theirs = {key: x.shape for key, x in network.state_dict().items()}
    with torch.device("meta"):
        ours = pretrainedmodels.se_resnext50_32x4d(pretrained=None).state_dict()
    assert len(theirs) == 384 and theirs == {key: x.shape for key, x in ours.items()}
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = h.ImageEncoder("se_resnext50_32x4d", str(tmp_path / "model.safetensors")).eval()
    pictures = some_pictures(2, 64)
    with torch.no_grad():
        expected = network.forward_features(h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD)).mean((2, 3))
        assert torch.allclose(encoder(pictures), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def weight_places(tmp_path, monkeypatch):
    """Empty caches of torch hub and the model hub, and a web server in place of pretrainedmodels' address.

    `publish(content, where, good)` puts a weight file into "cache", "address" or "hub", with its own checksum or not.
    """
    web, torch_home, hub = tmp_path / "web", tmp_path / "torch", tmp_path / "hub"
    web.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=web)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    torch.save({"x": torch.arange(3.0)}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    monkeypatch.setitem(pretrainedmodels.pretrained_settings["se_resnext50_32x4d"]["imagenet"], "url", url)
    cache = torch_home / "hub" / "checkpoints"

    def publish(where, good=True):
        if where == "hub":
            save_file({"x": torch.arange(3.0)}, tmp_path / "model.safetensors")
            digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
            repository = hub / f"models--{h.SERESNEXT_MIRROR.replace('/', '--')}"
            for folder in ("blobs", "refs", "snapshots/c0ffee"):
                (repository / folder).mkdir(parents=True)
            (tmp_path / "model.safetensors").rename(repository / "blobs" / (digest if good else "0" * 64))
            (repository / "refs" / "main").write_text("c0ffee")
            (repository / "snapshots" / "c0ffee" / "model.safetensors").symlink_to(
                f"../../blobs/{digest if good else '0' * 64}")
            return
        folder = {"cache": cache, "address": web}[where]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if good else content + b"!")

    yield namedtuple("Places", "publish name url cache")(publish, name, url, cache)
    server.shutdown()
    server.server_close()


def load_imagenet():
    weights, source = h.load_weights("se_resnext50_32x4d", "imagenet")
    assert torch.equal(weights["x"], torch.arange(3.0))
    return source


def test_weights_come_from_the_cache_then_the_address_then_the_mirror(weight_places):
    weight_places.publish("hub")
    assert load_imagenet() == f"model hub {h.SERESNEXT_MIRROR}"
    assert list(weight_places.cache.iterdir()) == []
    weight_places.publish("address")
    assert load_imagenet() == f"pretrainedmodels, {weight_places.url}"
    assert [path.name for path in weight_places.cache.iterdir()] == [weight_places.name]
    assert load_imagenet() == f"torch hub cache {weight_places.name}"


def test_sources_say_what_is_on_this_machine_without_asking_anyone(weight_places):
    def here():
        return [source.here for source in h.weight_sources("se_resnext50_32x4d", "imagenet")]

    assert here() == [False, False, False]
    weight_places.publish("cache")
    weight_places.publish("hub")
    assert here() == [True, False, True]
    assert h.weight_sources("small", "imagenet") == h.weight_sources("se_resnext50_32x4d", "none") == []
    (hub,) = h.weight_sources("timm/resnet18", "imagenet")
    assert (hub.label, hub.here) == ("model hub timm/resnet18.a1_in1k", False)
    cache, address = h.weight_sources("torchvision/resnet50", "imagenet")
    assert cache.label == "torch hub cache resnet50-11ad3fa6.pth"
    assert address.label == "torchvision, https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    with pytest.raises(ValueError, match="timm has no weights for .*; set image_weights"):
        h.weight_sources("timm/botnet50ts_256", "imagenet")


def test_files_with_a_wrong_checksum_are_not_used(weight_places):
    for where in ("cache", "address", "hub"):
        weight_places.publish(where, good=False)
    with pytest.raises(ValueError, match="no usable weights for se_resnext50_32x4d") as error:
        load_imagenet()
    tried = str(error.value)
    assert tried.count("its sha256 begins with") == 2 and "invalid hash value" in tried
    assert weight_places.url in tried and h.SERESNEXT_MIRROR in tried and "image_weights=<file>" in tried
    weight_places.publish("address")  # now it is right, and takes the damaged file's place
    assert load_imagenet() == f"pretrainedmodels, {weight_places.url}"
    assert load_imagenet() == f"torch hub cache {weight_places.name}"


def test_all_that_failed_is_in_one_sentence(weight_places):
    with pytest.raises(ValueError) as error:
        h.ImageEncoder("se_resnext50_32x4d", "imagenet")
    assert "\n" not in str(error.value)
    assert re.search("not there; .*404.*; model hub .*; bring the file by hand", str(error.value).replace(")", ";"))


@pytest.mark.parametrize("name", pretrainedmodels.model_names)
def test_address_of_every_network_says_its_checksum(name):
    assert len(h.hash_in_name(h.Path(h.pretrained_settings(name)["url"]))) >= 8


# --- the stage ----------------------------------------------------------------------------------------
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


def test_image_stage_starts_from_a_local_file_and_notices_another_one(make_run, tmp_path):
    file = tmp_path / "small.safetensors"
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(h.ImageEncoder("small").model.state_dict(), file)
        run = make_run(image_size=32, image_weights=str(file), image_lr=1e-9)
        h.split_stage(run)
        trained, key = h.load_file(h.image_encoder_stage(run) / "encoder.safetensors"), "layer4.0.conv1.weight"
        assert torch.allclose(trained[f"model.{key}"], h.load_file(file)[key], atol=1e-6)
        manifest = h.read_manifest(run, "seresnext")
        assert manifest["reads"]["weights"] == h.hash_file(file)
        assert manifest["metrics"]["weights_from"] == f"file {file}"
    assert h.describe_stages(run, "seresnext")["weights_from"].item() == f"file {file}"


def test_reading_of_regions_does_not_train_the_encoder_again(make_run):
    first, second = make_run(image_size=32), make_run(image_size=32, regions="feature_map")
    h.split_stage(first)
    folder = h.image_encoder_stage(first)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert h.image_encoder_stage(second) == folder and (folder / "manifest.json").stat().st_mtime_ns == before


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

    monkeypatch.setattr(h, "open_picture", refuse)
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


class Rows(torch.utils.data.Dataset):
    """Row i of an array of pictures."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return np.array(self.pictures[i])


def test_pictures_decoded_each_time_are_the_cached_ones_in_worker_processes_too(make_run, tmp_path):
    run = make_run(cache_pictures=False)
    h.split_stage(run)
    decoded = h.cached_pictures(run, 24)
    assert not (tmp_path / "data").exists()
    cached = h.cached_pictures(make_run(), 24)
    assert decoded.shape == cached.shape and decoded.dtype == cached.dtype and len(decoded) == len(cached)
    for index in (3, -1, slice(50, 60), slice(0, 0), np.array([7, 2, 2])):
        assert np.array_equal(decoded[index], cached[index])
    with pytest.raises(IndexError):
        decoded[len(decoded)]
    for pictures in (decoded, cached):
        loader = torch.utils.data.DataLoader(Rows(pictures), batch_size=20, num_workers=2)
        assert np.array_equal(torch.cat(list(loader)).numpy(), cached)


def test_full_disk_is_noticed_before_the_cache_is_begun(run, tmp_path, monkeypatch):
    h.split_stage(run)
    monkeypatch.setattr(h.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(20_000_000))
    with pytest.raises(OSError, match=r"needs 0\.03 GB in .*0\.02 GB are free.*cache_pictures=False"):
        h.cached_pictures(run, 400)
    assert list((tmp_path / "data" / "cache").iterdir()) == []
    rest = tmp_path / "data" / "cache" / "a.npy.partial"
    rest.write_bytes(b"of a kill")
    h.cache_file("a.npy", lambda path: path.write_text(str(path.exists())))
    assert rest.with_suffix("").read_text() == "False"  # gone before the new one asks for room
    assert h.cached_pictures(run, 40).shape == (55, 3, 40, 40)


def test_batch_normalisation_over_processes_keeps_the_activations():
    model = h.timm.layers.convert_sync_batchnorm(h.ImageEncoder("timm/efficientnet_b0").model)
    kinds = {type(layer).__name__ for layer in model.modules() if "BatchNorm" in type(layer).__name__}
    assert kinds == {"SyncBatchNormAct"}


def test_a_network_that_is_built_at_import_has_weights_of_its_own():
    """pretrainedmodels builds its ResNeXt-101 while it is imported, here on the meta device to save half a GB."""
    first, second = h.ImageEncoder("resnext101_32x4d"), h.ImageEncoder("resnext101_32x4d")
    assert not any(value.is_meta for value in first.state_dict().values())
    weights = [next(encoder.parameters()) for encoder in (first, second)]
    assert weights[0].std() > 0.01 and not torch.equal(*weights)
