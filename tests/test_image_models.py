"""Image networks: what they expect and give, whether they fit, their weights, stage seresnext."""
import hashlib
import pickle
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pretrainedmodels
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import helpers as h
from commands.store import stage_folders
from engine.files import hash_file
from engine.image_models import (
    IN_TIMM,
    PAPER_NETWORK,
    PAPER_WEIGHTS,
    check_network,
    create_timm,
    fit_weights,
    hub_repository,
    load_weights,
    make_network,
    read_weights,
    refusal,
)
from engine.keys import key_of, recipe_of
from engine.settings import make_profile


def some_pictures(n: int, side: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=random)


def as_imagenet(pictures: torch.Tensor) -> torch.Tensor:
    return h.normalise(pictures, h.IMAGENET_MEAN, h.IMAGENET_STD)


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- networks -------------------------------------------------------------------------------------
@torch.no_grad()
def test_small_encoder_gives_512_wide_vectors_of_pictures_and_of_single_tiles():
    encoder = h.ImageEncoder("small").eval()
    assert encoder.width == 512 and encoder.weights_from == "random weights"
    for side in (112, 64, 14, 4):
        assert encoder(some_pictures(2, side)).shape == (2, 512)
    pictures = some_pictures(2, 64)
    feature_map = encoder.model.features(as_imagenet(pictures))
    by_hand = feature_map.numpy().reshape(2, 512, -1).mean(-1)
    assert np.allclose(encoder(pictures).numpy(), by_hand, atol=1e-5)
    assert torch.equal(encoder(pictures.float()), encoder(pictures))


def test_what_prepares_the_pictures_is_not_saved_with_the_weights():
    with torch.device("meta"):
        encoder = h.ImageEncoder("small")
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"model"}
    buffers = {name for name, _ in encoder.named_buffers() if "." not in name}
    assert buffers == {"mean", "std"}


@torch.no_grad()
def test_full_size_encoder_is_se_resnext_50():
    encoder = h.ImageEncoder(PAPER_NETWORK).eval()
    assert encoder.width == 2048
    assert count(h.Classifier(encoder, encoder.width)) == 25_566_219
    assert encoder(some_pictures(1, 64)).shape == (1, 2048)
    assert encoder(some_pictures(1, 14)).shape == (1, 2048)


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name, width, parameters, mean, size, tiles", [
    (PAPER_NETWORK, 2048, 25_510_896, h.IMAGENET_MEAN, 224, True),
    ("small", 512, 295_572, h.IMAGENET_MEAN, 224, True),
    ("timm/legacy_seresnext50_32x4d", 2048, 25_510_896, h.IMAGENET_MEAN, 224, True),
    ("timm/resnet18", 512, 11_176_512, h.IMAGENET_MEAN, 224, True),
    ("timm/resnet50", 2048, 23_508_032, h.IMAGENET_MEAN, 224, True),
    ("timm/convnext_atto", 320, 3_374_520, h.IMAGENET_MEAN, 224, False),
    ("timm/vit_tiny_patch16_224", 192, 5_524_416, HALF, 224, False),
    ("timm/efficientnet_b0", 1280, 4_007_548, h.IMAGENET_MEAN, 224, True),
    ("timm/xception41", 2048, 24_920_560, HALF, 299, True),
    ("timm/mobilenetv3_small_100.lamb_in1k", 1024, 1_517_856, h.IMAGENET_MEAN, 224, True)])
def test_width_constants_and_size_come_from_the_network_itself(name, width, parameters, mean, size,
                                                               tiles):
    with torch.device("meta"):
        network, expects = make_network(name)
    network = network.eval()
    assert expects.width == width and count(network) == parameters
    assert expects.size == size and tuple(expects.mean) == pytest.approx(mean)
    assert refusal(network, width, size) == ""
    assert (refusal(network, width, 14) == "") == tiles


@pytest.mark.parametrize("name, close", [
    ("se_resnext51_32x4d", "se_resnext50_32x4d"), ("timm/resnet1", "timm/resnet18"),
    ("convnext_tiny", "timm/convnext_tiny"), ("torchvision/resnet50", "timm/resnet50"),
    ("xception", "timm/xception"), ("zzz", "examples: se_resnext50_32x4d, timm/")])
def test_unknown_encoder_is_named_with_a_few_close_names(name, close):
    with pytest.raises(ValueError, match=rf"unknown image encoder '{name}'.*{close}") as error:
        h.ImageEncoder(name)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", [*IN_TIMM.values(), "convnext_tiny",
                                  "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k"])
def test_networks_made_for_other_sizes_take_the_studys(name):
    with torch.device("meta"):
        network, expects = make_network(f"timm/{name}", 224)
    assert refusal(network.eval(), expects.width, 224) == ""


@pytest.mark.parametrize("name", IN_TIMM)
def test_a_vision_model_of_transformers_is_answered_with_timms_name(name):
    with pytest.raises(ValueError, match=rf"the same network is seresnext=timm/{IN_TIMM[name]}"):
        h.ImageEncoder(name)
    assert IN_TIMM[name] in timm.list_pretrained()


def test_a_transformers_positions_are_made_for_the_pictures():
    large = timm.create_model("test_vit", num_classes=0, img_size=160)
    small = create_timm("timm/test_vit", 64)
    assert large.pos_embed.shape[1] > small.pos_embed.shape[1]
    assert small.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, small.head_hidden_size)


def test_batch_normalisation_over_processes_keeps_the_activations():
    network, _ = make_network("timm/efficientnet_b0")
    network = timm.layers.convert_sync_batchnorm(network)
    kinds = {type(layer).__name__ for layer in network.modules()}
    assert {kind for kind in kinds if "BatchNorm" in kind} == {"SyncBatchNormAct"}


@pytest.mark.parametrize("name", [PAPER_NETWORK, "small"])
def test_a_network_that_is_built_at_import_has_weights_of_its_own(name):
    """pretrainedmodels builds networks while it is imported, here on the meta device to save half
    a GB.
    """
    first, second = h.ImageEncoder(name), h.ImageEncoder(name)
    assert not any(value.is_meta for value in first.state_dict().values())
    weights = [next(encoder.parameters()) for encoder in (first, second)]
    assert weights[0].std() > 0.01 and not torch.equal(*weights)


@pytest.mark.slow
@torch.no_grad()
def test_timms_network_of_that_name_is_pretrainedmodels_own(tmp_path):
    """Its weights are on the model hub: key by key, shape by shape, and number by number."""
    theirs = timm.create_model("legacy_seresnext50_32x4d").eval()
    own = pretrainedmodels.se_resnext50_32x4d(pretrained=None).eval()
    shapes = {key: tuple(x.shape) for key, x in theirs.state_dict().items()}
    assert shapes == {key: tuple(x.shape) for key, x in own.state_dict().items()}
    assert len(shapes) == 384
    own.load_state_dict(theirs.state_dict())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = h.ImageEncoder(PAPER_NETWORK, str(tmp_path / "model.safetensors")).eval()

    pictures = some_pictures(1, 224)
    pixels = as_imagenet(pictures).contiguous(memory_format=torch.channels_last)
    feature_map = theirs.forward_features(pixels)
    assert torch.equal(own.features(pixels), feature_map)
    assert torch.equal(ours(pictures), theirs.forward_head(feature_map, pre_logits=True))
    # Its own average of 7 x 7 cells adds in another order.
    assert torch.allclose(own(pixels), theirs(pixels), rtol=0, atol=1e-6)


# --- whether it fits ------------------------------------------------------------------------------
@pytest.mark.parametrize("settings, message", [
    ({"seresnext": "timm/vit_tiny_patch16_224"},
     "cannot take 14 x 14 tiles .*; set regions=feature_map"),
    ({"seresnext": "timm/convnext_atto"}, "cannot take 14 x 14 tiles .*; set regions=feature_map"),
    ({"seresnext": "timm/vit_tiny_patch16_224", "image_size": 8, "regions": "feature_map"},
     "cannot take pictures of 8 x 8 pixels .*; set image_size=224"),
    ({"seresnext": "timm/vit_tiny_patch16_224", "image_size": 80, "regions": "feature_map"}, ""),
    ({"seresnext": "timm/vit_tiny_patch16_224", "regions": "feature_map"}, ""),
    ({"seresnext": "timm/convnext_atto", "grid": 4}, ""), ({"seresnext": "timm/resnet50"}, ""),
    ({}, "")])
def test_network_that_cannot_take_pictures_or_tiles_is_refused(settings, message):
    profile = make_profile("paper", settings)
    if message:
        with pytest.raises(ValueError, match=f"^{settings['seresnext']} {message}"):
            check_network(profile)
    else:
        check_network(profile)


@pytest.mark.parametrize("frozen", [False, True])
def test_image_stage_refuses_such_a_network_before_it_begins(make_run, frozen):
    run = make_run(seresnext="timm/convnext_atto", region_size=224, image_size=224,
                   freeze_encoders=frozen, image_weights="none")
    h.stage(run, "splits")
    with pytest.raises(ValueError, match="14 x 14 tiles"):
        h.stage(run, "seresnext")
    assert [folder.name.partition("-")[0] for folder in stage_folders()] == ["splits"]


# --- weights from a file --------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_local_file_with_a_1000_class_head_gives_the_networks_own_features(tmp_path, suffix):
    network, path = timm.create_model("test_resnet").eval(), tmp_path / f"weights{suffix}"
    assert network.get_classifier().out_features == 1000
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    pictures = some_pictures(2, 64)
    encoder = h.ImageEncoder("timm/test_resnet", str(path)).eval()
    assert encoder.weights_from == f"file {path}"
    expected = network.forward_features(
        h.normalise(pictures, encoder.expects.mean, encoder.expects.std)).mean((2, 3))
    assert torch.allclose(encoder(pictures), expected, rtol=1e-4, atol=1e-5)


def test_local_file_is_found_from_the_projects_root(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.settings.ROOT", tmp_path)
    network = torch.nn.Linear(2, 1, bias=False)
    save_file({"weight": torch.ones(1, 2)}, tmp_path / "x.safetensors")
    assert load_weights(network, "small", "x.safetensors") == "file x.safetensors"
    assert network.weight.tolist() == [[1, 1]]


def test_no_weights_are_random_ones():
    network = torch.nn.Linear(2, 1)
    before = network.weight.clone()
    for name in ("small", PAPER_NETWORK):
        assert load_weights(network, name, "none") == "random weights"
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("network, setting, weights", [
    ("small", "imagenet", "none"), ("small", "none", "none"), (PAPER_NETWORK, "none", "none"),
    (PAPER_NETWORK, "imagenet", "imagenet")])
def test_there_are_no_weights_for_the_small_network(network, setting, weights):
    run = h.open_run("paper", "90-10", 0, {"seresnext": network, "image_weights": setting})
    assert h.image_weights(run) == weights


def test_weights_that_do_not_fit_are_named(tmp_path):
    own = h.ImageEncoder("small").model.state_dict()
    first, *rest = own
    wrong = rf"1 wrong shape \({first} \[3, 4\] instead of \[16, 3, 7, 7\]\)"
    for weights, message in [
            ({key: own[key] for key in rest}, rf"1 missing \({first}\)"),
            ({**own, "more.weight": torch.ones(27, 5)}, r"1 unexpected \(more.weight\)"),
            ({**own, first: torch.ones(3, 4)}, wrong)]:
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="do not fit small .*" + message):
            h.ImageEncoder("small", str(tmp_path / "w.safetensors"))


def test_a_head_is_dropped_and_nothing_else():
    network = torch.nn.Linear(2, 1000, bias=False)  # a layer of 1,000 that is the network's own
    weights = {"weight": torch.ones(1000, 2), "head.weight": torch.ones(1000, 2),
               "head.bias": torch.ones(1000)}
    fit_weights(network, weights, "x")
    assert (network.weight == 1).all()
    with pytest.raises(ValueError, match=r"do not fit x: 1 unexpected \(head.scale\)"):
        fit_weights(network, {**weights, "head.scale": torch.ones(7)}, "x")


class Intruder:
    """A pickle that makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_file_that_holds_code_is_refused_and_the_code_does_not_run(tmp_path):
    intruder = Intruder(tmp_path / "made")
    torch.save({"x": intruder}, tmp_path / "a.pth")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(intruder, protocol=2))
    for name in ("a.pth", "b.pt"):
        with pytest.raises(ValueError, match=f"{name}: it is damaged, or holds more than tensors"):
            h.ImageEncoder("small", str(tmp_path / name))
    assert not (tmp_path / "made").exists()
    pickle.loads((tmp_path / "b.pt").read_bytes()).close()
    assert (tmp_path / "made").exists()  # so it would have been


@pytest.mark.parametrize("name, content, message", [
    ("gone.pth", None, "there is no such file"), ("cut.safetensors", b"12345", "it is damaged"),
    ("empty.pth", b"", "it is damaged"), ("list.pth", [1, 2], "it does not hold a state dict"),
    ("words.pt", {"x": "y"}, "it does not hold a state dict")])
def test_file_that_is_no_state_dict_is_refused(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"no usable weights for small .*{name}: {message}.*"
                                         "image_weights=<file>"):
        h.ImageEncoder("small", str(tmp_path / name))


def test_file_that_was_cut_off_is_refused(tmp_path):
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save({"weight": torch.ones(100, 100)}, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        assert read_weights(tmp_path / name)["weight"].sum() == 10_000
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(ValueError, match="it is damaged"):
            read_weights(tmp_path / name)


# --- weights from the model hub -------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(repository, tensors): a file model.safetensors in the model hub's cache, made by hand;
    no other is there, and the network is never asked.
    """
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(repository: str, tensors: dict) -> Path:
        folder, commit = cache / f"models--{repository.replace('/', '--')}", "c0ffee"
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (folder / part).mkdir(parents=True)
        save_file(tensors, tmp_path / "model.safetensors")
        content = (tmp_path / "model.safetensors").read_bytes()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / "refs" / "main").write_text(commit)
        link = folder / "snapshots" / commit / "model.safetensors"
        link.symlink_to(Path("../..") / "blobs" / blob.name)
        return blob

    return publish


@pytest.mark.slow
@torch.no_grad()
def test_papers_weights_come_from_the_model_hubs_cache(hub):
    published = timm.create_model("legacy_seresnext50_32x4d").eval()
    hub(PAPER_WEIGHTS, published.state_dict())
    encoder = h.ImageEncoder(PAPER_NETWORK, "imagenet").eval()
    assert encoder.weights_from == f"model hub {PAPER_WEIGHTS}"
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, published.state_dict()[name])


@torch.no_grad()
def test_timms_weights_come_from_the_model_hubs_cache(hub):
    published = timm.create_model("test_resnet").eval()
    hub("timm/test_resnet.r160_in1k", published.state_dict())
    encoder = h.ImageEncoder("timm/test_resnet", "imagenet").eval()
    assert encoder.weights_from == "model hub timm/test_resnet.r160_in1k"
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, published.state_dict()[name])


def test_wrong_files_of_the_model_hub_are_named(hub):
    weights = h.ImageEncoder("small").model.state_dict()
    blob = hub(PAPER_WEIGHTS, weights)
    with pytest.raises(ValueError, match=rf"the weights do not fit {PAPER_NETWORK} \(model hub "
                                         rf"{PAPER_WEIGHTS}\): \d+ wrong shape \(.*missing"):
        h.ImageEncoder(PAPER_NETWORK, "imagenet")
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"no usable weights for {PAPER_NETWORK} .model hub "
                                         f"{PAPER_WEIGHTS}: .*; bring the file by hand"):
        h.ImageEncoder(PAPER_NETWORK, "imagenet")


@pytest.mark.parametrize("name, repository", [
    (PAPER_NETWORK, PAPER_WEIGHTS), ("timm/test_resnet", "timm/test_resnet.r160_in1k")])
def test_all_that_failed_is_in_one_sentence(hub, name, repository):
    with pytest.raises(ValueError) as error:
        h.ImageEncoder(name, "imagenet")
    said = str(error.value)
    assert "\n" not in said and re.match(rf"no usable weights for {name} \(model hub "
                                         rf"{repository}: .+\); bring the file by hand", said)
    assert "image_weights=<file>" in said and "image_weights=none for random weights" in said


def test_repository_of_a_networks_weights_is_known_without_asking_anyone():
    assert hub_repository(PAPER_NETWORK) == PAPER_WEIGHTS
    assert hub_repository("timm/resnet18") == "timm/resnet18.a1_in1k"
    with pytest.raises(ValueError, match="timm has no weights for timm/botnet50ts_256; set image_"):
        hub_repository("timm/botnet50ts_256")


# --- the stage ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_image_stage_saves_what_loads_into_the_encoder(make_run):
    run = make_run(image_size=32)
    for name in ("splits", "seresnext"):
        folder = h.stage(run, name)
    encoder = h.load_image_encoder(run)
    metrics = h.read_manifest(run, "seresnext")["metrics"]
    assert not encoder.training and metrics["best_epoch"] == 1
    assert metrics["parameters"] == count(h.Classifier(encoder, 512))
    assert sorted(path.name for path in folder.iterdir()) == [
        "curve.csv", "encoder.safetensors", "head.safetensors", "manifest.json"]  # and no pickle
    steps = [value for name, value in encoder.state_dict().items()
             if name.endswith("num_batches_tracked")]
    # 44 rows in batches of 32: the statistics are those of training.
    assert steps and all(step == 2 for step in steps)


@pytest.mark.slow
def test_image_stage_starts_from_a_local_file_and_notices_another_one(make_run, tmp_path):
    file, key = tmp_path / "small.safetensors", "layer4.0.conv1.weight"
    run = make_run(image_size=32, image_weights=str(file), image_lr=1e-9, limit=20)
    h.stage(run, "splits")
    folders = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(h.ImageEncoder("small").model.state_dict(), file)
        folder = h.stage(run, "seresnext")
        trained = load_file(folder / "encoder.safetensors")
        assert torch.allclose(trained[f"model.{key}"], load_file(file)[key], atol=1e-6)
        manifest = h.read_manifest(run, "seresnext")
        assert manifest["contents"]["image_weights"] == hash_file(file)
        assert manifest["metrics"]["weights_from"] == f"file {file}"
        folders.add(folder)
    assert len(folders) == 2
    assert h.describe_stages(run, "seresnext")["weights_from"].item() == f"file {file}"


def test_reading_of_regions_does_not_train_the_encoder_again(make_run):
    tiles = make_run()
    for settings in ({"regions": "feature_map"}, {"grid": 8}, {"region_size": 128}):
        other = make_run(**settings)
        assert key_of(other, "seresnext") == key_of(tiles, "seresnext")
        assert key_of(other, "image_regions") != key_of(tiles, "image_regions")
    assert not {"grid", "regions"} & recipe_of(tiles, "seresnext")["settings"].keys()


def test_only_training_pictures_are_augmented():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16)).astype(np.uint8)
    split = pd.DataFrame({"part": ["train", "val", "val", "train"], "label_id": [1, 2, 3, 4]})
    val = h.picture_rows(pictures, split, "val", 16, 0)
    assert [int(val[i]["labels"]) for i in range(2)] == [2, 3]
    assert all((val[i]["pixels"].numpy() == pictures[i + 1]).all() for i in range(2))
    train = h.picture_rows(pictures, split, "train", 16, 0)
    assert not (train[0]["pixels"].numpy() == pictures[0]).all()


def test_imagenets_mean_and_deviation_are_the_published_ones():
    assert h.IMAGENET_MEAN == (0.485, 0.456, 0.406) and h.IMAGENET_STD == (0.229, 0.224, 0.225)
