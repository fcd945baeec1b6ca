"""SE-ResNeXt-50, its small relative, any network of timm, and their weights."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.files import hash_source, one_line
from engine.fingerprint import content
from engine.runs import Run, from_root
from engine.settings import Profile

with torch.device("meta"):  # it builds two large networks while it is imported: half a GB
    from pretrainedmodels.models.senet import SENet, SEResNeXtBottleneck

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAPER_NETWORK = "se_resnext50_32x4d"
# On the model hub: the weights that pretrainedmodels' own address had, key by key.
PAPER_WEIGHTS = "timm/legacy_seresnext50_32x4d.in1k"


# --- networks -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PictureFormat:
    """What a network expects and gives: mean and deviation per channel (red, green, blue; bytes as
    0 to 1), pixels a side, width of its vectors.
    """
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    size: int = 224
    width: int = 2048


class SmallSENet(SENet):
    """SE-ResNeXt at a quarter of its width: pretrainedmodels' blocks, 512 output channels.

    Shown in 05.
    """

    def __init__(self):
        super().__init__(
            SEResNeXtBottleneck, [1, 1, 1, 1], groups=8, reduction=16, dropout_p=None, inplanes=16,
            input_3x3=False, downsample_kernel_size=1, downsample_padding=0)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 4, *args, **kwargs)


def se_resnext50() -> SENet:
    """pretrainedmodels' SE-ResNeXt-50 32x4d with random weights."""
    return SENet(SEResNeXtBottleneck, [3, 4, 6, 3], groups=32, reduction=16, dropout_p=None,
                 inplanes=64, input_3x3=False, downsample_kernel_size=1, downsample_padding=0)


def make_network(name: str, size: int = 224) -> tuple[nn.Module, PictureFormat]:
    """(network with random weights and without its classification layer, what it expects); of a
    transformer one for pictures of `size` pixels a side.

    ValueError with close names for one that is not known.
    """
    if name in (PAPER_NETWORK, "small"):
        network = SmallSENet() if name == "small" else se_resnext50()
        network.avg_pool = nn.AdaptiveAvgPool2d(1)  # of 7 x 7 cells: made for one picture size
        network.last_linear = nn.Identity()
        return network, PictureFormat(width=512 if name == "small" else 2048)
    network = create_timm(name, size)
    data = timm.data.resolve_model_data_config(network)
    width = network.head_hidden_size
    return network, PictureFormat(data["mean"], data["std"], data["input_size"][-1], width)


def create_timm(name: str, size: int, **more: object) -> nn.Module:
    """A network of timm without its classification layer; of a transformer one whose positions are
    made for `size` pixels a side, its weights' own resized where it has them.
    """
    model = timm_name(name)
    try:
        return timm.create_model(model, num_classes=0, img_size=size, **more)
    except TypeError:  # a convolutional network takes pictures of any size
        return timm.create_model(model, num_classes=0, **more)


# Vision models of the hub that transformers would load, and the same networks in timm.
IN_TIMM = {
    "facebook/convnext-base-224": "convnext_base.fb_in1k",
    "facebook/dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "vit_base_patch16_dinov3.lvd1689m",
    "google/siglip2-base-patch16-256": "vit_base_patch16_siglip_256.v2_webli",
    "google/vit-base-patch16-224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "microsoft/swinv2-base-patch4-window8-256": "swinv2_base_window8_256.ms_in1k",
    "openai/clip-vit-base-patch32": "vit_base_patch32_clip_224.openai",
}


def timm_name(name: str) -> str:
    """"resnet50" of "timm/resnet50"; ValueError with close names for one that is not known."""
    library, _, model = name.rpartition("/")
    if library == "timm" and (timm.is_model(model) or model in timm.list_pretrained()):
        return model
    if name in IN_TIMM:
        raise ValueError(f"image encoder {name!r} is transformers' name; the same network is "
                         f"seresnext=timm/{IN_TIMM[name]}")
    known = [PAPER_NETWORK, "small", *(f"timm/{other}" for other in timm.list_models())]
    close = difflib.get_close_matches(name, known, n=5)
    examples = f"examples: {PAPER_NETWORK}, timm/convnext_tiny"
    hint = f"close names: {', '.join(close)}" if close else examples
    raise ValueError(f"unknown image encoder {name!r}; it must be {PAPER_NETWORK}, small, or "
                     f"timm/<name>; {hint}")


def check_network(profile: Profile) -> None:
    """ValueError if the profile's network cannot take its pictures or tiles, and what would do.

    Takes no time: on PyTorch's meta device a tensor has a shape and no content.
    """
    name, side = profile.seresnext, profile.image_size
    with torch.device("meta"):
        network, expects = make_network(name, side)
    network = network.to("meta").eval()
    if why := refusal(network, expects.width, side):
        raise ValueError(f"{name} cannot take pictures of {side} x {side} pixels ({why}); set "
                         f"image_size={expects.size}")
    if profile.regions == "tiles":
        side = profile.region_size // profile.grid
        if why := refusal(network, expects.width, side):
            raise ValueError(f"{name} cannot take {side} x {side} tiles ({why}); set "
                             "regions=feature_map, which reads the features of the whole picture")


@torch.inference_mode()
def refusal(network: nn.Module, width: int, side: int) -> str:
    """Why a network in eval mode cannot take pictures of `side` x `side` pixels; "" if it can."""
    pixels = torch.zeros(2, 3, side, side, device=next(network.parameters()).device)
    try:
        shape = list(network(pixels).shape)
    except Exception as error:  # each network fails in its own way
        return one_line(error)
    if shape != [2, width]:
        return f"a picture gives {shape[1:]} numbers instead of {width}"
    return ""


# --- pictures -------------------------------------------------------------------------------------
# --- weights --------------------------------------------------------------------------------------
@content(lambda run: hash_source(image_weights(run)))
def image_weights(run: Run) -> str:
    """Where the image network's weights come from: "imagenet", "none", or a file."""
    profile = run.profile
    # The small network is this study's own: there are no weights for it.
    small = profile.seresnext == "small" and profile.image_weights == "imagenet"
    return "none" if small else profile.image_weights


def weight_file(weights: str) -> Path | None:
    """The file that the setting `image_weights` names, from the project's root; None if none."""
    return None if weights in ("imagenet", "none") else from_root(weights)


def hub_repository(name: str) -> str:
    """Where the model hub keeps a network's ImageNet weights; ValueError if it has none."""
    if name == PAPER_NETWORK:
        return PAPER_WEIGHTS
    config = timm.get_pretrained_cfg(timm_name(name))
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm has no weights for {name}; set image_weights to a file, or to none")
    return config.hf_hub_id


def load_weights(network: nn.Module, name: str, weights: str, size: int = 224) -> str:
    """Give a network for pictures of `size` pixels its weights, strictly; where they come from.

    "imagenet": from the model hub or its cache here. ValueError says what was wrong and how to
    bring the file by hand.
    """
    if weights == "none":
        return "random weights"
    file = weight_file(weights)
    source = f"file {weights}" if file else f"model hub {hub_repository(name)}"
    try:
        tensors = read_weights(file) if file else download_weights(name, size)
    except Exception as error:  # of a network, a cache, a file: each has its own
        raise ValueError(
            f"no usable weights for {name} ({source}: {one_line(error)}); bring the file by hand "
            "and set image_weights=<file> (.safetensors, .pth or .pt), or image_weights=none for "
            "random weights") from error
    fit_weights(network, tensors, f"{name} ({source})")
    return source


def download_weights(name: str, size: int) -> dict[str, Tensor]:
    """A network's ImageNet weights from the model hub, or from the hub's cache on this machine."""
    if name == PAPER_NETWORK:
        return load_file(hf_hub_download(PAPER_WEIGHTS, "model.safetensors"))
    return create_timm(name, size, pretrained=True).state_dict()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file; no code that it may hold is run.

    FileNotFoundError if it is missing, ValueError if it is damaged or holds anything else.
    """
    if not path.exists():
        raise FileNotFoundError("there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"it is damaged, or holds more than tensors ({one_line(error)})") \
            from error
    named = isinstance(tensors, dict)
    if not named or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("it does not hold a state dict (a dictionary of tensors)")
    return dict(tensors)


def fit_weights(network: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights into a network without classifier; a 1,000-class head is dropped, all others
    must match. ValueError names keys that are missing or unexpected, and shapes that differ.
    """
    own = network.state_dict()
    weights = {key: x for key, x in weights.items()
               if key in own or x.shape[:1] not in ((1000,), (1001,))}
    shared = own.keys() & weights.keys()
    wrong = {
        "wrong shape": [f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}"
                        for key in sorted(shared) if weights[key].shape != own[key].shape],
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own]}
    if any(wrong.values()):
        parts = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
                 for word, keys in wrong.items() if keys]
        raise ValueError(f"the weights do not fit {what}: {'; '.join(parts)}; set image_weights to "
                         "a file of this very network")
    network.load_state_dict(weights)
