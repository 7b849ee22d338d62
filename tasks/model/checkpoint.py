"""Reads and writes checkpoints: the location encoder, image projection and image encoder of one embedding space.

============================ ======================================================================
object                       content
============================ ======================================================================
model.safetensors            `location.*`: the location encoder's weights; `projection.*`: the
                             image projection; `encoder.*`: the fitted arrays of the image encoder.
                             Of several members `location.members.0.*`, `projection.members.0.*` ...
card.json                    architecture, image encoder, fingerprint of the weights, data,
                             metrics, history; of several members a history of each
============================ ======================================================================

An imported SatCLIP checkpoint has all three where its image encoder is a published one. Otherwise it has the location
encoder alone, which embeds places and queries a database but encodes no images.
"""

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from infra import storage
from infra.errors import UserError
from tasks.arrays import damaged
from tasks.cards import read_card, write_card
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders.images import ImageEncoder
from tasks.core.encoders.location import PlaceEncoder
from tasks.core.encoders.registry import load_encoder
from tasks.core.ensemble import Projections, projection_for, rebuild
from tasks.products import Architecture, CheckpointCard, EncoderFacts

ZIP, DIGEST = b"PK\x03\x04", 32  # first bytes of a `torch.save`; length in bytes of the SHA-256 before it


@dataclass(frozen=True)
class Checkpoint:
    """The models of one embedding space."""

    location: PlaceEncoder
    """Maps places into the space."""
    projection: ImageProjection | Projections | None
    """Maps image features into the space; None where only the location encoder was imported."""
    encoder: ImageEncoder | None
    """Maps images to features; None where only the location encoder was imported."""
    card: CheckpointCard
    """What the checkpoint is and how it was made."""


def save_checkpoint(
    url: str,
    location: PlaceEncoder,
    projection: ImageProjection | Projections | None = None,
    encoder: ImageEncoder | None = None,
    **told: Any,
) -> CheckpointCard:
    """Writes a checkpoint, its card last, and returns the card.

    Args:
        url: Directory of the checkpoint.
        location: The location encoder, of one or several members.
        projection: The image projection, of the same members; given together with `encoder`.
        encoder: The image encoder that the projection was trained on.
        **told: More entries of the card, such as data, metrics and history.
    """
    tensors = named("location", location.state_dict())
    if projection is not None and encoder is not None:
        arrays = {name: torch.from_numpy(array) for name, array in encoder.arrays().items()}
        tensors |= named("projection", projection.state_dict()) | named("encoder", arrays)
        told["encoder"] = describe(encoder)
    data = serialise(tensors)
    storage.write(storage.join(url, "model.safetensors"), data)
    digest = hashlib.sha256(data).hexdigest()[:12]
    card = CheckpointCard(fingerprint=digest, architecture=Architecture(**location.architecture), **told)
    write_card(url, card)
    return card


def describe(encoder: ImageEncoder) -> EncoderFacts:
    """Returns what an image encoder states, for a card."""
    return EncoderFacts(
        name=encoder.name,
        bands=encoder.bands,
        dim=encoder.dim,
        resolution_m=encoder.resolution_m,
        normalisation=encoder.normalisation,
    )


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with a prefix before their names."""
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def load_checkpoint(url: str) -> Checkpoint:
    """Reads a checkpoint, in evaluation mode.

    Raises:
        UserError: There is no checkpoint, or its weights do not match its card.
    """
    card = read_card(url, CheckpointCard)
    data = storage.read(storage.join(url, "model.safetensors"))
    if hashlib.sha256(data).hexdigest()[:12] != card.fingerprint:
        raise UserError(f"the weights at {url} are not those of its card: copy the checkpoint again, whole")
    tensors = parse(data)
    weights = part_of(tensors, "location")
    location = rebuild(card.architecture.model_dump(exclude_unset=True))
    location.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    location.eval()
    if card.encoder is None:
        return Checkpoint(location, None, None, card)
    arrays = {name: tensor.numpy() for name, tensor in part_of(tensors, "encoder").items()}
    try:
        encoder = load_encoder(card.encoder.name, arrays, card.encoder.bands)
    except ValueError as error:
        raise UserError(f"the image encoder of {url} cannot be loaded: {error}") from error
    projection = projection_for(location, encoder.dim)
    projection.load_state_dict(part_of(tensors, "projection"))
    return Checkpoint(location, projection.eval(), encoder, card)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names have a prefix, without the prefix."""
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def dump_state(state: dict[str, Any]) -> bytes:
    """Returns a training state as bytes, after their SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def parse_state(data: bytes, place: str) -> dict[str, Any]:
    """Reads a training state from its bytes. Nothing in them is executed; those of earlier versions have no digest.

    Raises:
        Damaged: The bytes are not those that were written.
    """
    if not data.startswith(ZIP):
        digest, data = data[:DIGEST], data[DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise damaged(place, "its digest is another")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise damaged(place, error) from error


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Returns tensors as a .safetensors file that holds their digest."""
    return serialise(tensors, {"sha256": _digest(tensors)})


def unpack(data: bytes, place: str) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file of ours, and checks their digest; earlier versions wrote none.

    Raises:
        Damaged: The tensors are not those that were written.
    """
    try:
        tensors = parse(data)
        told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise damaged(place, error) from error
    if told and told.get("sha256") != _digest(tensors):
        raise damaged(place, "its digest is another")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of names, shapes, types and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def keys_of(checkpoint: Checkpoint, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the database keys of image features, (n, dim) unit vectors.

    Raises:
        UserError: The checkpoint has no image projection.
    """
    if checkpoint.projection is None:
        raise UserError(
            "this checkpoint was imported and has no image projection: import the database that was "
            "published with it, or train a checkpoint on your patches"
        )
    return checkpoint.projection.keys(features)
