"""Puts several location encoders of one recipe side by side, with an image projection each.

Their unit vectors are joined and divided by the root of their number. So joined vectors have length 1 again, and the
cosine of two of them is the mean of the members' cosines.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tasks.core.contrastive import ImageProjection
from tasks.core.encoders.location import LocationEncoder, PlaceEncoder, SingleEncoder
from tasks.core.encoders.tessellation import Tessellation

KINDS: dict[str, type[SingleEncoder]] = {"harmonics": LocationEncoder, "tessellation": Tessellation}


class Aligned(Protocol):
    """A location encoder and an image projection that were trained together."""

    location: SingleEncoder
    """The location encoder."""
    projection: ImageProjection
    """The projection of image features into its space."""


class Ensemble(PlaceEncoder):
    """Several location encoders side by side, used as one."""

    def __init__(self, members: Iterable[SingleEncoder]) -> None:
        """Takes encoders of one architecture."""
        super().__init__()
        found = list(members)
        self.members = nn.ModuleList(found)
        self.dim, self.degree = sum(member.dim for member in found), found[0].degree
        self._member = found[0].architecture

    @property
    def architecture(self) -> dict[str, Any]:
        """Returns a member's architecture, with the number of members and the length of the joined vectors."""
        return {**self._member, "dim": self.dim, "members": len(self.members)}

    def embed(self, lonlat: NDArray[np.float64], batch: int = 4096) -> NDArray[np.float32]:
        """Returns the members' unit embeddings side by side, (n, dim) float32, each of length 1."""
        return side_by_side([member.embed(lonlat, batch) for member in self.members])


def first_member(encoder: PlaceEncoder, keys: NDArray[np.float32]) -> tuple[PlaceEncoder, NDArray[np.float32]]:
    """Returns an ensemble's first member and its part of keys, (n, dim) unit vectors; another encoder as it is."""
    if not isinstance(encoder, Ensemble):
        return encoder, keys
    member = encoder.members[0]
    assert isinstance(member, LocationEncoder)  # for the type checker: __init__ took such
    return member, keys[:, : member.dim] * np.float32(math.sqrt(len(encoder.members)))


class Projections(nn.Module):
    """The image projections of an ensemble's members."""

    def __init__(self, members: Iterable[ImageProjection]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def keys(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the members' unit keys of (n, feature) features side by side, (n, dim), each of length 1."""
        return side_by_side([member.keys(features) for member in self.members])


def side_by_side(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Joins unit vectors, (n, dim) each, to unit vectors of (n, parts * dim)."""
    return np.concatenate(parts, axis=1) / np.float32(math.sqrt(len(parts)))


def together(trained: Sequence[Aligned]) -> tuple[PlaceEncoder, ImageProjection | Projections]:
    """Returns the location encoder and the image projection of one training, or of several side by side."""
    if len(trained) == 1:
        return trained[0].location, trained[0].projection
    return Ensemble(one.location for one in trained), Projections(one.projection for one in trained)


def rebuild(architecture: Mapping[str, Any]) -> PlaceEncoder:
    """Makes a location encoder of what one told as its architecture, with weights still to be replaced."""
    one = dict(architecture)
    members, kind = one.pop("members", None), KINDS[one.pop("kind", "harmonics")]
    if members is None:
        return kind(**one)
    one["dim"] //= members
    return Ensemble(kind(**one) for _ in range(members))


def projection_for(location: PlaceEncoder, features: int) -> ImageProjection | Projections:
    """Makes the projection of image features of a length into an encoder's space, with weights still to be replaced."""
    if isinstance(location, Ensemble):
        return Projections(ImageProjection(features, location.dim // len(location.members)) for _ in location.members)
    return ImageProjection(features, location.dim)
