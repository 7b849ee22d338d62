"""Imports SatCLIP's Lightning checkpoints without executing anything in them, and exports to their format."""

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.cards import made_before
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders.harmonics import Basis
from tasks.core.encoders.images import ImageEncoder
from tasks.core.encoders.location import LocationEncoder, PlaceEncoder
from tasks.core.encoders.registry import load_tower
from tasks.foreign import check_free, read_file, write_file
from tasks.model.checkpoint import Checkpoint, load_checkpoint, named, part_of, save_checkpoint
from tasks.model.weights import first_line, unpickle
from tasks.products import CheckpointCard

FOREIGN_LOCATION = "model.location.nnet"
LARGEST = {"legendre_polys": 100, "capacity": 4096, "num_hidden_layers": 16, "embed_dim": 4096}
VISION = {  # SatCLIP's vision_layers: our encoder, and the name of its last layer
    "moco_vit16": ("satclip-vit16", "head"),
    "moco_resnet18": ("satclip-resnet18", "fc"),
    "moco_resnet50": ("satclip-resnet50", "fc"),
}
FOREIGN_BASIS: dict[str, Basis] = {"analytic": "analytic", "closed-form": "orthonormal"}


def import_satclip(source: str | Path, url: str) -> CheckpointCard:
    """Imports a SatCLIP Lightning checkpoint. Nothing in the file is executed.

    The image tower is imported where SatCLIP published its architecture: the tower up to its pooled features becomes
    the image encoder, its last layer the projection. Another image tower is left out, and the card says so.

    Args:
        source: Path or URL of a `satclip-*.ckpt`, as used by microsoft/satclip and rangegeo.
        url: Directory of the new checkpoint.

    Returns:
        The new checkpoint's card, or that of an earlier import of the same file.

    Raises:
        UserError: The file is no such checkpoint or has an unsupported architecture, or another product is at `url`.
    """
    data = read_file(source, "a satclip-*.ckpt")
    made_of = {"file": name_of(as_url(source)), "sha256": hashlib.sha256(data).hexdigest()}
    if there := made_before(url, CheckpointCard, made_of):
        return there
    content = unpickle(data, source, "a satclip-*.ckpt")
    try:
        settings = dict(_mapping(content["hyper_parameters"]))
        weights = dict(content["state_dict"])
        location = _location_of(settings, part_of(weights, FOREIGN_LOCATION))
        encoder, projection, note = _image_side_of(settings, part_of(weights, "model.visual"), location.dim)
    except UserError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{shown(source)} is not a SatCLIP checkpoint ({first_line(error)}): give a satclip-*.ckpt"
        ) from error
    return save_checkpoint(url, location, projection, encoder, source="SatCLIP", made_of=made_of, **note)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value


def _location_of(settings: dict[str, Any], weights: dict[str, Tensor]) -> LocationEncoder:
    _require(settings, "le_type", ["sphericalharmonics"])
    _require(settings, "pe_type", ["siren"])
    _require(settings, "harmonics_calculation", list(FOREIGN_BASIS))
    degree, hidden, layers, dim = (_size(settings, name) for name in LARGEST)
    location = LocationEncoder(degree, hidden, layers, dim, FOREIGN_BASIS[settings["harmonics_calculation"]])
    ours = {_our_name(name, layers): _floats(name, tensor) for name, tensor in weights.items()}
    if location.basis == "orthonormal":
        ours["layers.0.weight"] = ours["layers.0.weight"] * _signs(degree)
    location = location.to(ours["layers.0.weight"].dtype)
    location.load_state_dict(ours)
    return location


def _size(settings: dict[str, Any], name: str) -> int:
    """Returns a size that the file claims, after a check of its bounds, before memory is taken for it."""
    value = settings[name]
    if not isinstance(value, int) or not 1 <= value <= LARGEST[name]:
        raise UserError(f"the checkpoint's {name} is {value!r}: only 1 to {LARGEST[name]} can be imported")
    return value


def _floats(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.float32, torch.float64):
        value = tensor
    else:
        value = tensor.float()
    if not torch.isfinite(value).all():
        raise UserError(f"the checkpoint's {name} has numbers that are not finite: it is damaged")
    return value


def _image_side_of(
    settings: dict[str, Any], visual: dict[str, Tensor], dim: int
) -> tuple[ImageEncoder | None, ImageProjection | None, dict[str, Any]]:
    """Returns image encoder and projection, or neither and a note that tells why."""
    kind = settings.get("vision_layers")
    if not visual or str(kind) not in VISION:
        if visual:
            why = f"vision_layers {kind!r} is none of {', '.join(VISION)}"
        else:
            why = "the file has no model.visual"
        return None, None, {"image_side": f"not imported: {why}"}
    name, head = VISION[str(kind)]
    encoder = load_tower(name, {key: _floats(key, tensor).numpy() for key, tensor in visual.items()})
    projection = ImageProjection(encoder.dim, dim)
    projection.linear.load_state_dict(part_of(visual, head))
    return encoder, projection, {}


def _require(settings: dict[str, Any], name: str, known: list[str]) -> None:
    if settings[name] not in known:
        raise UserError(f"the checkpoint's {name} is {settings[name]!r}: only {' and '.join(known)} can be imported")


def _our_name(name: str, layers: int) -> str:
    return name.replace("last_layer.", f"layers.{layers}.")


def _their_name(name: str, layers: int) -> str:
    return name.replace(f"layers.{layers}.", "last_layer.")


def _signs(degree: int) -> Tensor:
    """Returns (-1)^m of each harmonic: SatCLIP's closed form has the Condon-Shortley sign, ours has not."""
    orders = np.concatenate([np.arange(-n, n + 1) for n in range(degree)])
    return torch.from_numpy(np.where(orders % 2, -1.0, 1.0)).float()


def export_satclip(url: str, target: str | Path, overwrite: bool = False) -> str:
    """Writes a SatCLIP checkpoint that rangegeo reads.

    Weights of the orthonormal basis are written for SatCLIP's `closed-form` harmonics, which are stable; its `analytic`
    ones are wrong by up to 8 % near the poles. A SatCLIP image tower is written too, with the projection as its last
    layer. The format has no place for any other image encoder.

    Args:
        url: The checkpoint.
        target: Path or URL of the file to write.
        overwrite: Whether to replace a file that exists.

    Returns:
        The file's URL.

    Raises:
        UserError: The format has no place for the checkpoint's location encoder, or the file is there.
    """
    check_free(target, overwrite)
    model = load_checkpoint(url)
    location = _of_satclip(url, model.location)
    visual, settings = _visual_of(model)
    weights = named(FOREIGN_LOCATION, _their_location(location)) | named("model.visual", visual)
    buffer = io.BytesIO()
    torch.save({"hyper_parameters": _settings_of(location) | settings, "state_dict": weights}, buffer)
    return write_file(target, buffer.getvalue(), overwrite)


def _of_satclip(url: str, location: PlaceEncoder) -> LocationEncoder:
    """Returns the location encoder, if it is one that SatCLIP's format can hold.

    Raises:
        UserError: It is another.
    """
    if isinstance(location, LocationEncoder):
        return location
    told = location.architecture
    if "members" in told:
        what = f"{told['members']} members"
    else:
        what = f"a {told['kind']}"
    raise UserError(
        f"{url} has {what} and SatCLIP's format has room for one location encoder of spherical harmonics: export a "
        "checkpoint that was trained with --members 1 --location harmonics"
    )


def _their_location(location: LocationEncoder) -> dict[str, Tensor]:
    ours = dict(location.state_dict())
    ours["layers.0.weight"] = ours["layers.0.weight"].double() * location.damping
    if location.basis == "orthonormal":
        ours["layers.0.weight"] *= _signs(location.degree)
    layers = len(location.layers) - 1
    return {_their_name(name, layers): tensor for name, tensor in ours.items()}


def _visual_of(model: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the image tower as SatCLIP has it, with standardisation folded into the last layer; empty if none."""
    kinds = {name: (kind, head) for kind, (name, head) in VISION.items()}
    projection = model.projection
    if model.encoder is None or not isinstance(projection, ImageProjection) or model.encoder.name not in kinds:
        return {}, {}
    kind, head = kinds[model.encoder.name]
    weight = projection.linear.weight.detach() / projection.std
    last = {"weight": weight, "bias": projection.linear.bias.detach() - weight @ projection.mean}
    tower = {name: torch.from_numpy(array) for name, array in model.encoder.arrays().items()}
    return tower | named(head, last), {"vision_layers": kind}


def _settings_of(location: LocationEncoder) -> dict[str, Any]:
    foreign = {ours: theirs for theirs, ours in FOREIGN_BASIS.items()}
    sizes = zip(LARGEST, (location.degree, location.hidden, len(location.layers) - 1, location.dim), strict=True)
    return {
        "le_type": "sphericalharmonics",
        "pe_type": "siren",
        "harmonics_calculation": foreign[location.basis],
        **dict(sizes),
        "min_radius": 1,  # parameters of other encodings, which SatCLIP's constructor reads too
        "max_radius": 360,
        "frequency_num": 10,
    }
