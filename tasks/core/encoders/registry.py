"""Finds the image encoders by name.

================== ============================ ====== ================================================
name               bands                        dim    weights
================== ============================ ====== ================================================
rcf                any                          chosen none: fitted to a sample of the images
satclip-vit16      the 12 of L2A, B10 zero      384    a SatCLIP checkpoint's `model.visual.*`
satclip-resnet18   the 12 of L2A, B10 zero      512    as above
satclip-resnet50   the 12 of L2A, B10 zero      2048   as above
satmae             B04, B03, B02                1024   SatMAE ViT-L, pretrained on fMoW RGB
satmae-sentinel2   B02 to B08, B8A, B11, B12    1024   SatMAE ViT-L, pretrained on fMoW-Sentinel
module:function    its own                      its own its own
================== ============================ ====== ================================================

The satclip and satmae encoders take the middle 224 x 224 pixels of an image, as SatCLIP and the published RANGE
database do, satmae-sentinel2 the middle 96 x 96. Smaller images are enlarged first.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tasks.core.encoders import vision
from tasks.core.encoders.images import ImageEncoder, Images, check_images, standardise
from tasks.core.encoders.rcf import fit_rcf, load_rcf

Arrays = dict[str, NDArray]
Fit = Callable[[Images, tuple[str, ...], int, int], ImageEncoder]
Load = Callable[[Arrays, tuple[str, ...]], ImageEncoder]

BATCH = 16  # images encoded at a time: the tokens of a ViT-L take 13 MB a layer
SENTINEL2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
ABSENT = {"B10"}  # the cirrus band, which L2A lacks; SatCLIP was trained with zeros in its place
TRUE_COLOUR = 0.2  # reflectance that is white in the L2A true colour image, SatMAE's input in RANGE
MARKING = "decorate it with image_encoder_builder, in the module that defines it"
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))  # mean and deviation of RGB in 0 to 1


@dataclass(frozen=True, eq=False)
class TorchEncoder:
    """An image encoder that is a PyTorch module, for images of any size."""

    name: str
    """Name by which `load_encoder` finds it."""
    module: nn.Module
    """Network from (n, channel, size, size) to (n, dim)."""
    channels: tuple[str, ...]
    """Bands that the module takes, in order; bands that L2A lacks are zero."""
    dim: int
    """Length of a feature vector."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from the reflectance, per channel or for all."""
    std: tuple[float, ...] = (1.0,)
    """Divisor of the difference, per channel or for all."""
    brightest: float = 1.0
    """Reflectance that higher values are clipped to."""
    levels: int | None = None
    """Number of steps to which the quotient is cut, between 0 and 1; None: it is taken as it is."""
    size: int = 224
    """Side of the module's input in pixels."""
    resolution_m: float | None = 10.0
    """Pixel size in metres that it was trained on."""

    @property
    def bands(self) -> tuple[str, ...]:
        """Returns the bands that it takes from images, in order."""
        return tuple(band for band in self.channels if band not in ABSENT)

    @property
    def normalisation(self) -> str:
        """Tells in words what it does to reflectance and to nodata."""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        most = f"at most {self.brightest:g}, " if np.isfinite(self.brightest) else ""
        cut = f", in 0 to 1 by steps of 1/{self.levels}" if self.levels else ""
        return (
            f"{most}less ({mean}), divided by ({std}){cut}; nodata to its band's mean in the image; "
            f"the middle {self.size} pixels{self._epsilon}"
        )

    @property
    def _epsilon(self) -> str:
        """Tells the epsilon of the layer norms where it is not a ViT's own."""
        found = {norm.eps for norm in self.module.modules() if isinstance(norm, nn.LayerNorm)} - {vision.EPSILON}
        return f"; epsilon of layer norms {found.pop():g}" if found else ""

    @torch.no_grad()
    def encode(self, reflectance: Images) -> NDArray[np.float32]:
        """Encodes (n, band, y, x) reflectance, NaN for nodata, as (n, dim)."""
        check_images(reflectance, self.bands)
        self.module.eval()
        parts = [self._encode(reflectance[i : i + BATCH]) for i in range(0, len(reflectance), BATCH)]
        if parts:
            return np.concatenate(parts)
        return np.empty((0, self.dim), np.float32)

    def _encode(self, images: Images) -> NDArray[np.float32]:
        filled = standardise(images, np.zeros(1, np.float32), np.ones(1, np.float32))
        device = next(self.module.parameters()).device
        x = middle(torch.from_numpy(filled).to(device), self.size).clamp(max=self.brightest)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        x = (self._all_channels(x) - mean) / std
        if self.levels:
            x = (x.clamp(0, 1) * self.levels).floor() / self.levels
        return self.module(x).float().cpu().numpy()

    def _all_channels(self, x: Tensor) -> Tensor:
        if self.channels == self.bands:
            return x
        out = x.new_zeros(len(x), len(self.channels), *x.shape[2:])
        out[:, [self.channels.index(band) for band in self.bands]] = x
        return out

    def arrays(self) -> Arrays:
        """Returns the weights by name."""
        return {name: tensor.cpu().numpy() for name, tensor in self.module.state_dict().items()}


def middle(images: Tensor, size: int) -> Tensor:
    """Returns the middle `size` x `size` pixels of (n, band, y, x); smaller images are enlarged bilinearly first."""
    smallest = min(images.shape[2:])
    if smallest < size:
        rows, columns = (round(side * size / smallest) for side in images.shape[2:])
        images = functional.interpolate(images, (rows, columns), mode="bilinear", align_corners=False)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class Tower:
    """A published image encoder: what `load_tower` needs beside its weights."""

    network: Callable[[int], nn.Module]
    """Makes the network for a number of channels."""
    channels: tuple[str, ...]
    """Bands that the network takes, in order."""
    dim: int
    """Length of a feature vector."""
    mean: tuple[float, ...] = (0.0,)
    """As in `TorchEncoder`."""
    std: tuple[float, ...] = (1.0,)
    """As in `TorchEncoder`."""
    brightest: float = 1.0
    """As in `TorchEncoder`."""
    levels: int | None = None
    """As in `TorchEncoder`."""
    size: int = 224
    """As in `TorchEncoder`."""


FMOW_MEAN = np.array([1184.3824625, 1120.77120066, 1136.26026392, 1263.73947144, 1645.40315151, 1846.87040806,
                      1762.59530783, 1972.62420416, 1732.16362238, 1247.91870117]) / 10_000  # fmt: skip
FMOW_STD = np.array([650.2842772, 712.12507725, 965.23119807, 948.9819932, 1108.06650639, 1258.36394548,
                     1233.1492281, 1364.38688993, 1310.36996126, 1087.6020813]) / 10_000  # fmt: skip
# fMoW-Sentinel's numbers, divided by 10,000, of the ten bands: 0 to 1 is two deviations about the mean either way.

TOWERS = {
    "satclip-vit16": Tower(vision.vit_small, SENTINEL2, 384),
    "satclip-resnet18": Tower(vision.resnet18, SENTINEL2, 512),
    "satclip-resnet50": Tower(vision.resnet50, SENTINEL2, 2048),
    "satmae": Tower(
        vision.vit_large_mean,
        ("B04", "B03", "B02"),
        1024,
        tuple(TRUE_COLOUR * IMAGENET[0]),
        tuple(TRUE_COLOUR * IMAGENET[1]),
        TRUE_COLOUR,
    ),
    "satmae-sentinel2": Tower(
        vision.vit_large_grouped,
        ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
        1024,
        tuple(FMOW_MEAN - 2 * FMOW_STD),
        tuple(4 * FMOW_STD),
        np.inf,
        levels=255,
        size=96,
    ),
}


def load_tower(name: str, arrays: Arrays, bands: tuple[str, ...] = ()) -> TorchEncoder:
    """Builds a published image encoder from weights with timm's names.

    Other weights among them, such as those of a decoder, are left out.

    Args:
        name: One of `TOWERS`.
        arrays: The weights.
        bands: Ignored, since the encoder has its own.

    Raises:
        ValueError: A weight is missing, has another shape or is not finite.
    """
    tower = TOWERS[name]
    with torch.device("meta"):  # takes no memory and no random numbers: all weights are replaced
        module = tower.network(len(tower.channels))
    weights = {key: _weight(name, key, like, arrays) for key, like in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    how = (tower.mean, tower.std, tower.brightest, tower.levels, tower.size)
    return TorchEncoder(name, module, tower.channels, tower.dim, *how)


def _weight(name: str, key: str, like: Tensor, arrays: Arrays) -> Tensor:
    if key.endswith("num_batches_tracked"):  # used in training only; some files lack it
        return torch.zeros((), dtype=torch.int64)
    if key not in arrays:
        raise ValueError(f"the weights of {name} lack {key}: give those of the published tower, with timm's names")
    value = np.asarray(arrays[key])
    if value.shape != tuple(like.shape):
        raise ValueError(f"{key} of {name} has shape {value.shape}, not {tuple(like.shape)}: give the tower's weights")
    if not np.isfinite(value).all():
        raise ValueError(f"{key} of {name} has numbers that are not finite: the weights are damaged")
    return torch.from_numpy(value.astype(np.float32, copy=False))


FITTED: dict[str, Fit] = {"rcf": fit_rcf}
LOADED: dict[str, Load] = {"rcf": load_rcf} | {name: partial(load_tower, name) for name in TOWERS}


def image_encoder_builder(function: Load) -> Load:
    """Marks `function(arrays, bands)` as one that `load_encoder("module:function", …)` may call.

    The first call gets the arrays of a file of weights. Every later call gets the `arrays()` of the encoder that the
    function returned.

    A checkpoint's card names its encoder, and a checkpoint may come from anyone. So no function without the mark is
    called, and no module is imported before the mark was seen in its source, as a decorator above the function.
    """
    function.builds_image_encoder = True  # type: ignore[attr-defined]
    return function


def fit_encoder(name: str, sample: Images, bands: tuple[str, ...], dim: int, seed: int) -> ImageEncoder:
    """Fits a named encoder that needs no weights to a sample of images.

    Raises:
        ValueError: The name is unknown, or its encoder needs weights.
    """
    if name in FITTED:
        return FITTED[name](sample, bands, dim, seed)
    _builder(name)
    raise ValueError(
        f"the image encoder {name!r} needs weights: give the path or URL of its .safetensors, .pth or .bin"
    )


def load_encoder(name: str, arrays: Arrays, bands: tuple[str, ...]) -> ImageEncoder:
    """Builds a named encoder from its stored arrays, or from published weights.

    Args:
        name: One of the table above, or `package.module:function` of a marked function.
        arrays: Arrays by name, from a file of weights or from the encoder's own `arrays()`.
        bands: Bands of the images; ignored by an encoder that has its own.

    Raises:
        ValueError: The name is unknown, or the arrays do not fit its encoder.
    """
    build = _builder(name)
    try:
        encoder = build(arrays, bands)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be built of these weights: {' '.join(str(error).split())[:200]}") from error
    if encoder.name != name:
        raise ValueError(f"{name} builds an encoder that calls itself {encoder.name!r}: they must be the same")
    return encoder


def _builder(name: str) -> Load:
    if name in LOADED:
        return LOADED[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"the image encoder {name!r} is unknown: use one of {', '.join(sorted(LOADED))}, or module:function"
        )
    if module not in sys.modules and not _is_marked(_source(name, module), function):
        raise ValueError(f"{name} does not say that it builds image encoders: {MARKING}")
    try:
        found = vars(importlib.import_module(module))[function]
    except (ImportError, KeyError) as error:
        raise ValueError(f"{name} was not found ({error}): install its package here and on every worker") from error
    if not getattr(found, "builds_image_encoder", False):
        raise ValueError(f"{name} does not say that it builds image encoders: {MARKING}")
    return found


def _source(name: str, module: str) -> ast.Module:
    """Parses the source of an installed module, and imports neither the module nor a package above it.

    Raises:
        ValueError: There is no such module, or it has no Python source.
    """
    spec, folders, parts = None, None, module.split(".")
    for i in range(len(parts)):
        full = ".".join(parts[: i + 1])
        spec = _found(full, folders)
        if spec is None:
            raise ValueError(f"{name} was not found (no module {full!r}): install its package here and on every worker")
        folders = spec.submodule_search_locations
    read = getattr(spec.loader, "get_source", None) if spec else None
    try:
        if read:
            return ast.parse(read(module))
        return ast.Module([], [])
    except (ImportError, SyntaxError, TypeError, ValueError):  # compiled, or no source that this Python reads
        raise ValueError(f"{name} is in no Python source, where a mark could be seen: {MARKING}") from None


def _found(module: str, folders: Any) -> ModuleSpec | None:
    found = (finder.find_spec(module, folders) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    try:
        return next((one for one in found if one), None)
    except KeyError:  # nested packages without __init__.py: their parents would have to be imported
        raise ValueError(f"{module} is in a package without __init__.py: give it one, and the packages above") from None


def _is_marked(source: ast.Module, function: str) -> bool:
    """Tells whether a source defines a function with the mark above it.

    Raises:
        ValueError: There is no such function.
    """
    named = [n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == function]
    if not named:
        raise ValueError(f"the function {function!r} was not found in its module: {MARKING}")
    return any(
        "image_encoder_builder" in (getattr(d, "id", ""), getattr(d, "attr", "")) for d in named[-1].decorator_list
    )
