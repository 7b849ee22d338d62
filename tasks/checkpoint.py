"""The checkpoint: the trained location encoder, the image projection and the image encoder of one space.

============================ ======================================================================
object                       content
============================ ======================================================================
model.safetensors            `location.*`: the location encoder's weights; `projection.*`: the
                             image projection; `encoder.*`: the fitted arrays of the image encoder
card.json                    architecture, image encoder, fingerprint (of the weights), data,
                             metrics, history
============================ ======================================================================

An imported SatCLIP checkpoint has the location part alone: it can embed and retrieve, but encode no images.
"""

import argparse
import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card, write_card
from tasks.core.contrastive import ImageProjection
from tasks.core.harmonics import Basis
from tasks.core.images import ImageEncoder, load_encoder
from tasks.core.location import LocationEncoder

ALLOWED: list[Any] = [argparse.Namespace]  # what Lightning puts beside plain containers and tensors
PREFIX = "model.location.nnet."
FOREIGN_BASIS: dict[str, Basis] = {"analytic": "analytic", "closed-form": "orthonormal"}


@dataclass(frozen=True)
class Checkpoint:
    """One space of embeddings."""

    location: LocationEncoder
    """Places into the space."""
    projection: ImageProjection | None
    """Image features into the space; none in an imported checkpoint."""
    encoder: ImageEncoder | None
    """Images to features; none in an imported checkpoint."""
    card: dict[str, Any]
    """What it is and how it was made."""


def save_checkpoint(
    url: str,
    location: LocationEncoder,
    projection: ImageProjection | None = None,
    encoder: ImageEncoder | None = None,
    **card: Any,
) -> dict[str, Any]:
    """Writes a checkpoint, the card last; returns the card.

    Args:
        url: Directory of the checkpoint.
        location: The location encoder.
        projection: The image projection, with `encoder`.
        encoder: The image encoder that the projection was trained on.
        **card: More to record: data, metrics, history.
    """
    tensors = _named("location", location.state_dict())
    if projection is not None and encoder is not None:
        arrays = {name: torch.from_numpy(array) for name, array in encoder.arrays().items()}
        tensors |= _named("projection", projection.state_dict()) | _named("encoder", arrays)
        card["encoder"] = {"name": encoder.name, "bands": list(encoder.bands), "dim": encoder.dim}
    data = serialise(tensors)
    storage.write(storage.join(url, "model.safetensors"), data)
    return write_card(
        url,
        "checkpoint",
        fingerprint=hashlib.sha256(data).hexdigest()[:12],
        architecture=location.architecture,
        **card,
    )


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def load_checkpoint(url: str) -> Checkpoint:
    """Reads a checkpoint, in evaluation mode.

    Raises:
        UserError: None is there, or its weights are not those that its card describes.
    """
    card = read_card(url, "checkpoint")
    data = storage.read(storage.join(url, "model.safetensors"))
    if hashlib.sha256(data).hexdigest()[:12] != card["fingerprint"]:
        raise UserError(f"the weights at {url} are not those of its card: copy the checkpoint again, whole")
    tensors = parse(data)
    location = LocationEncoder(**card["architecture"]).to(tensors["location.layers.0.weight"].dtype)
    location.load_state_dict(_part(tensors, "location"))
    location.eval()
    if "encoder" not in card:
        return Checkpoint(location, None, None, card)
    arrays = {name: tensor.numpy() for name, tensor in _part(tensors, "encoder").items()}
    encoder = load_encoder(card["encoder"]["name"], arrays, tuple(card["encoder"]["bands"]))
    projection = ImageProjection(encoder.dim, location.dim)
    projection.load_state_dict(_part(tensors, "projection"))
    return Checkpoint(location, projection.eval(), encoder, card)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def import_satclip(path: Path, url: str) -> dict[str, Any]:
    """Imports the location encoder of a SatCLIP Lightning checkpoint; nothing in the file is executed.

    Args:
        path: `satclip-*.ckpt`, as microsoft/satclip and rangegeo read it.
        url: Directory of the new checkpoint.

    Returns:
        The new checkpoint's card.

    Raises:
        UserError: The file is not such a checkpoint, or has parts that this project does not have.
    """
    content = _unpickle(path)
    try:
        settings = dict(_mapping(content["hyper_parameters"]))
        weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
        location = _from_foreign(settings, weights)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} is not a SatCLIP checkpoint ({error}): give a satclip-*.ckpt") from error
    made_of = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return save_checkpoint(url, location, source="SatCLIP", made_of=made_of)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: give the path of a satclip-*.ckpt") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is no checkpoint that can be read without running code from it ({reason[:200]}): "
            "give a satclip-*.ckpt as published"
        ) from error


def _mapping(value: Any) -> dict[str, Any]:
    return vars(value) if isinstance(value, argparse.Namespace) else value


def _from_foreign(settings: dict[str, Any], weights: dict[str, Tensor]) -> LocationEncoder:
    _require(settings, "le_type", ["sphericalharmonics"])
    _require(settings, "pe_type", ["siren"])
    _require(settings, "harmonics_calculation", list(FOREIGN_BASIS))
    layers = int(settings["num_hidden_layers"])
    location = LocationEncoder(
        degree=int(settings["legendre_polys"]),
        hidden=int(settings["capacity"]),
        layers=layers,
        dim=int(settings["embed_dim"]),
        basis=FOREIGN_BASIS[settings["harmonics_calculation"]],
    )
    ours = {_our_name(name, layers): tensor for name, tensor in weights.items()}
    if location.basis == "orthonormal":
        ours["layers.0.weight"] = ours["layers.0.weight"] * _signs(location.degree)
    location = location.to(ours["layers.0.weight"].dtype)
    location.load_state_dict(ours)
    return location


def _require(settings: dict[str, Any], name: str, known: list[str]) -> None:
    if settings[name] not in known:
        raise UserError(f"the checkpoint's {name} is {settings[name]!r}: only {' and '.join(known)} can be imported")


def _our_name(name: str, layers: int) -> str:
    return name.replace("last_layer.", f"layers.{layers}.")


def _their_name(name: str, layers: int) -> str:
    return name.replace(f"layers.{layers}.", "last_layer.")


def _signs(degree: int) -> Tensor:
    """(-1)^m of each harmonic: the published closed form has the Condon-Shortley sign, ours has not."""
    orders = np.concatenate([np.arange(-n, n + 1) for n in range(degree)])
    return torch.from_numpy(np.where(orders % 2, -1.0, 1.0)).float()


def export_satclip(url: str, path: Path) -> None:
    """Writes the location encoder as a SatCLIP checkpoint that rangegeo and microsoft/satclip read.

    Weights of the orthonormal basis are written for their `closed-form` harmonics, which are stable; their
    `analytic` ones are wrong by up to 8 % near the poles.

    Args:
        url: The checkpoint.
        path: The file to write.
    """
    location = load_checkpoint(url).location
    ours = dict(location.state_dict())
    ours["layers.0.weight"] = ours["layers.0.weight"].double() * location.damping
    if location.basis == "orthonormal":
        ours["layers.0.weight"] *= _signs(location.degree)
    layers = len(location.layers) - 1
    weights = {PREFIX + _their_name(name, layers): tensor for name, tensor in ours.items()}
    torch.save({"hyper_parameters": _settings_of(location), "state_dict": weights}, path)


def _settings_of(location: LocationEncoder) -> dict[str, Any]:
    foreign = {ours: theirs for theirs, ours in FOREIGN_BASIS.items()}
    return {
        "le_type": "sphericalharmonics",
        "pe_type": "siren",
        "legendre_polys": location.degree,
        "harmonics_calculation": foreign[location.basis],
        "embed_dim": location.dim,
        "capacity": location.architecture["hidden"],
        "num_hidden_layers": location.architecture["layers"],
        "min_radius": 1,  # of other encodings; read by their constructor
        "max_radius": 360,
        "frequency_num": 10,
    }


def dump_state(state: dict[str, Any]) -> bytes:
    """A training state as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def parse_state(data: bytes) -> dict[str, Any]:
    """The training state from its bytes; nothing in them is executed."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def keys_of(checkpoint: Checkpoint, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Database keys of image features, (n, dim) unit vectors.

    Raises:
        UserError: The checkpoint has no image side.
    """
    if checkpoint.projection is None:
        raise UserError(
            "this checkpoint was imported and has no image projection: import the database that was "
            "published with it, or train a checkpoint on your patches"
        )
    return checkpoint.projection.keys(features)
