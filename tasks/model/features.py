"""Computes image features once: training reads them, and the database stores them as values.

`features/<id>/` holds `encoder.safetensors` (the image encoder, fitted to a sample of the patches),
`features.zarr` (an array `features` (view, image, feature) float32, one object per view and shard of images) and
`card.json`. View 0 is the image itself. The others are augmented views for training.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, name_of
from infra.errors import Refused, UserError
from tasks import arrays
from tasks.cards import fingerprint, is_finished, product_url, read_card, write_card
from tasks.core.encoders.images import ImageEncoder, take_bands
from tasks.core.encoders.registry import fit_encoder, load_encoder
from tasks.core.encoders.vision import RSHF_EPSILON
from tasks.foreign import read_file
from tasks.model.checkpoint import Checkpoint, describe, load_checkpoint, pack, unpack
from tasks.model.weights import PICKLED, load_tensors
from tasks.params import EncoderParams
from tasks.patches.store import Patches, open_patches
from tasks.products import FeaturesCard, PatchesCard
from tasks.units import log, run_units

SHARD = 512  # images in a shard of features: 2 MB, some seconds of work
SYMMETRIES = 8  # rotations and reflections of a square
PIECE = 1 << 25  # pixel values encoded at a time, 2 to 14 bytes each: a shard of large images would take gigabytes
READERS = 8  # shards read at a time
WEIGHTS = "the weights of the image encoder, a .safetensors, .pth or .bin"
REVISED = {"satmae": {"epsilon": RSHF_EPSILON}}  # what makes other features of the same weights than a former version
RUNS, RUN = 40, 50  # runs, and images in a run, that an encoder is fitted to; runs are spread over the whole store


def features_url(patches: str, params: EncoderParams, views: int) -> str:
    """Returns the URL of the features of the patches by an encoder, whether they exist or not."""
    return product_url("features", _made_of(patches, params, views))


def _made_of(patches: str, params: EncoderParams, views: int) -> dict[str, Any]:
    return {"patches": read_card(patches, PatchesCard).fingerprint, "views": views, **identity(params)}


def encode_features(client: Client, patches: str, params: EncoderParams, views: int = 1) -> str:
    """Encodes all views of all patches by one encoder, and resumes what an earlier run began.

    Args:
        client: The Dask cluster.
        patches: URL of the patches.
        params: The encoder.
        views: Number of views of each patch.

    Returns:
        The URL of the features.

    Raises:
        UserError: The encoder does not take the patches, or a patch could not be encoded.
    """
    made_of = _made_of(patches, params, views)
    url = product_url("features", made_of)
    if is_finished(url):
        return url
    images = len(open_store(patches).manifest)
    _prepare(url, patches, params)
    encoder = open_encoder(url, patches, params.name)
    _try(encoder, patches, views)
    _table(url).create(
        (views, images, encoder.dim),
        dtype="f4",
        chunks=(1, min(SHARD, images), encoder.dim),
        fill_value=np.nan,
        dimension_names=("view", "image", "feature"),
    )
    units = [(view, shard) for view in range(views) for shard in range(-(-images // SHARD))]
    done = {(view, shard) for view in range(views) for shard in _table(url).written(view)}
    run_units(
        client,
        partial(encode_shard, url, patches, params.name),
        [unit for unit in units if unit not in done],
        label="features",
        there=len(done),
    )
    card = FeaturesCard(fingerprint=fingerprint(made_of), made_of=made_of, images=images, encoder=describe(encoder))
    write_card(url, card)
    return url


def _try(encoder: ImageEncoder, patches: str, views: int) -> None:
    """Encodes one image in its last, smallest view, so that an unfit encoder is refused before the work."""
    source, view = open_store(patches), views - 1
    try:
        encode_rows(encoder, source, slice(0, 1), view)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the encoder {encoder.name} does not take view {view} of {patches} ({error}): train on fewer views, "
            "or sample larger patches"
        ) from error


def identity(params: EncoderParams) -> dict[str, Any]:
    """Returns what determines an encoder: its parameters, with the digest of its weights in place of their path."""
    if params.weights is None:
        return params.model_dump()
    digest = hashlib.sha256(read_file(_weights_file(params.weights), WEIGHTS)).hexdigest()
    return {**params.model_dump(), "weights": digest, **REVISED.get(params.name, {})}


def _weights_file(place: str) -> str:
    """Returns the URL of a file of weights, in the directory of a checkpoint where that was given."""
    url = as_url(place)
    if name_of(url).endswith((".safetensors", *PICKLED)):
        return url
    inside = storage.join(url, "model.safetensors")
    with suppress(Refused):  # a signed URL serves one file only
        return inside if storage.exists(inside) else url
    return url


def read_weights(place: str) -> dict[str, NDArray]:
    """Returns the weights of an image encoder, by name.

    Args:
        place: Path or URL of a .safetensors, .pth or .bin file, or of a checkpoint with an image encoder. Nothing in
            the file is executed.

    Raises:
        UserError: There is no such file, or it has no weights.
    """
    file = _weights_file(place)
    tensors = load_tensors(file, WEIGHTS)
    found = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}
    if file == as_url(place):
        return found
    return {name.removeprefix("encoder."): a for name, a in found.items() if name.startswith("encoder.")}


def _prepare(url: str, patches: str, params: EncoderParams) -> None:
    where = storage.join(url, "encoder.safetensors")
    if storage.exists(where):
        return
    source = open_store(patches)
    try:
        if params.weights is not None:
            encoder = load_encoder(params.name, read_weights(params.weights), source.bands)
        else:
            encoder = fit_encoder(params.name, _sample(source), source.bands, params.dim, params.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_takes(encoder, source, encoder.name)
    tensors = {name: torch.from_numpy(array) for name, array in encoder.arrays().items()}
    storage.create(where, pack(tensors))


def check_takes(encoder: ImageEncoder, source: Patches, taker: str) -> None:
    """Refuses patches that lack a band of the encoder, and warns where their resolution is not the encoder's.

    Raises:
        UserError: A band is missing.
    """
    missing = [band for band in encoder.bands if band not in source.bands]
    if missing:
        raise UserError(
            f"{source.url} has the bands {', '.join(source.bands)} and {taker} takes "
            f"{', '.join(encoder.bands)}: sample patches with {', '.join(missing)}, or use another encoder"
        )
    metres = source.card.recipe.resolution_m
    if encoder.resolution_m and metres and metres != encoder.resolution_m:
        log().warning("%s was trained on pixels of %g m; these have %g m", encoder.name, encoder.resolution_m, metres)


def encode_rows(encoder: ImageEncoder, source: Patches, rows: slice, view: int = 0) -> NDArray[np.float32]:
    """Returns features of a view of some patches, (n, feature), from the encoder's bands, `PIECE` values at a time."""
    step = max(1, PIECE // math.prod(source.shape[1:]))
    pieces = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    return np.concatenate([_encode_piece(encoder, source, piece, view) for piece in pieces])


def _encode_piece(encoder: ImageEncoder, source: Patches, rows: slice, view: int) -> NDArray[np.float32]:
    return encoder.encode(view_of(take_bands(source.reflectance(rows), source.bands, encoder.bands), view))


def _sample(source: Patches) -> NDArray[np.float32]:
    images = len(source.manifest)
    if images <= RUNS * RUN:
        return source.reflectance(slice(0, images))
    starts = np.linspace(0, images - RUN, RUNS).astype(int).tolist()
    return np.concatenate([source.reflectance(slice(i, i + RUN)) for i in starts])


@lru_cache(maxsize=2)
def open_store(patches: str) -> Patches:
    """Opens patches, once per worker process, since a finished store never changes."""
    return open_patches(patches)


@lru_cache(maxsize=2)
def open_encoder(url: str, patches: str, name: str) -> ImageEncoder:
    """Loads the fitted encoder of the features at `url`, once per worker process."""
    where = storage.join(url, "encoder.safetensors")
    tensors = unpack(storage.read(where), where)
    fitted = {key: tensor.numpy() for key, tensor in tensors.items()}
    return load_encoder(name, fitted, open_store(patches).bands)


def view_of(images: NDArray[np.float32], view: int) -> NDArray[np.float32]:
    """Returns a view of images, (n, band, y, x).

    Views 0 to 7 are rotations and reflections, since from above no side is up; view 0 is the images themselves. Views 8
    to 15 are the same of a corner of three quarters of the side, with another corner for each rotation.
    """
    turn, mirrored, cropped = view % 4, view // 4 % 2, view // SYMMETRIES
    if cropped:
        images = _corner(images, turn)
    turned = np.rot90(images, turn, (2, 3))
    return np.ascontiguousarray(turned[..., ::-1] if mirrored else turned)


def _corner(images: NDArray[np.float32], corner: int) -> NDArray[np.float32]:
    side = 3 * images.shape[2] // 4
    return images[
        :,
        :,
        slice(-side, None) if corner % 2 else slice(side),
        slice(-side, None) if corner // 2 else slice(side),
    ]


def encode_shard(url: str, patches: str, name: str, unit: tuple[int, int]) -> None:
    """Encodes one view of one shard of patches, and writes it as one object."""
    view, shard = unit
    images = len(open_store(patches).manifest)
    rows = slice(shard * SHARD, min((shard + 1) * SHARD, images))
    values = encode_rows(open_encoder(url, patches, name), open_store(patches), rows, view)
    _table(url).write(rows.start, values, view)


def _table(url: str) -> arrays.Table:
    return arrays.Table(storage.join(url, "features.zarr", "features"))


def read_features(url: str, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Returns features of the images without augmentation, (n, feature)."""
    return _table(url).read((0, rows))


class StoredFeatures:
    """The features at a URL as training reads them: in whole shards, with the last used kept in memory."""

    def __init__(self, url: str, images: int) -> None:
        """Opens the features, to keep two windows of `images` in memory, since a batch can span two windows."""
        self._stored = _table(url).open()
        self.shape: tuple[int, int, int] = self._stored.shape
        self.run = self._stored.chunks[1]
        self._shard = lru_cache(maxsize=2 * -(-images // self.run))(self._read)
        self._readers = ThreadPoolExecutor(READERS)

    def _read(self, number: int) -> NDArray[np.float32]:
        view, shard = divmod(number, -(-self.shape[1] // self.run))
        return arrays.read(self._stored, (view, slice(shard * self.run, (shard + 1) * self.run)))

    def take(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns features of images, each in the view at the same position, (n, feature)."""
        numbers, which = np.unique(views * -(-self.shape[1] // self.run) + rows // self.run, return_inverse=True)
        out = np.empty((len(rows), self.shape[2]), np.float32)
        for i, shard in enumerate(self._readers.map(self._shard, numbers.tolist())):
            at = np.flatnonzero(which == i)
            out[at] = shard[rows[at] % self.run]
        return out


@lru_cache(maxsize=2)
def load(checkpoint: str) -> Checkpoint:
    """Loads a checkpoint, once per worker process."""
    return load_checkpoint(checkpoint)


def image_encoder(model: Checkpoint, patches: str) -> ImageEncoder:
    """Returns the checkpoint's image encoder, after a check that the patches have its bands.

    Raises:
        UserError: A band is missing, or the checkpoint has no image encoder.
    """
    if model.encoder is None:
        raise UserError(
            "this checkpoint was imported without an image tower and encodes no images: import the database "
            "that was published with it, or train a checkpoint on your patches"
        )
    check_takes(model.encoder, open_store(patches), "the checkpoint")
    return model.encoder
