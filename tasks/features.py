"""Image features, computed once: training reads them and the database keeps them as values.

`features/<id>/` holds `encoder.safetensors` (the image encoder, fitted to a sample of the patches),
`features.zarr` (an array `features` (view, image, feature) float32, one object per view and shard of images) and
`card.json`. View 0 is the image itself; the others are what training may see in its place.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import zarr
from distributed import Client
from numpy.typing import NDArray
from safetensors.torch import load as parse
from safetensors.torch import save as serialise

from infra import storage
from infra.errors import UserError
from tasks.cards import fingerprint, is_finished, product_url, read_card, write_card
from tasks.core.images import ImageEncoder, fit_encoder, load_encoder
from tasks.params import EncoderParams
from tasks.patches import Patches, open_patches
from tasks.units import run_units

SHARD = 512  # images: 2 MB of features, some seconds of work
SYMMETRIES = 8  # of the square
READERS = 8  # shards that are read at a time
RUNS, RUN = 40, 50  # images that an encoder is fitted to: runs of neighbours, spread over the whole store


def features_url(patches: str, params: EncoderParams, views: int) -> str:
    """Where the features of the patches by an encoder are, or will be."""
    return product_url("features", _made_of(patches, params, views))


def _made_of(patches: str, params: EncoderParams, views: int) -> dict[str, Any]:
    return {"patches": read_card(patches, "patches")["fingerprint"], "views": views, **params.model_dump()}


def encode_features(client: Client, patches: str, params: EncoderParams, views: int) -> str:
    """Encodes all views of all patches by one encoder, resuming what an earlier run began.

    Args:
        client: The Dask cluster.
        patches: URL of the patches.
        params: The encoder.
        views: Number of views of each patch.

    Returns:
        The URL of the features.

    Raises:
        UserError: The encoder does not take the patches, or one could not be encoded.
    """
    made_of = _made_of(patches, params, views)
    url = features_url(patches, params, views)
    if is_finished(url):
        return url
    images = len(open_store(patches).manifest)
    _fit(url, patches, images, params)
    _try(url, patches, params.name, views)
    _create(url, views, images, params.dim)
    units = [(view, shard) for view in range(views) for shard in range(-(-images // SHARD))]
    done = {(view, shard) for view in range(views) for shard in _written(url, view)}
    run_units(
        client,
        partial(encode_shard, url, patches, params.name),
        [unit for unit in units if unit not in done],
        label="features",
    )
    write_card(url, "features", fingerprint=fingerprint(made_of), made_of=made_of, images=images)
    return url


def _written(url: str, view: int) -> set[int]:
    there = storage.names(storage.join(url, "features.zarr", "features", "c", str(view)))
    return {int(name) for name in there if name.isdigit()}


def _try(url: str, patches: str, name: str, views: int) -> None:
    """Encodes one image in its last view, the smallest, so that what the encoder cannot do is told before the work."""
    image = view_of(open_store(patches).reflectance(slice(0, 1)), views - 1)
    try:
        open_encoder(url, patches, name).encode(image)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the encoder {name} does not take view {views - 1} of {patches}, {image.shape[3]} x {image.shape[2]} "
            f"pixels ({error}): train on fewer views, or sample larger patches"
        ) from error


def _fit(url: str, patches: str, images: int, params: EncoderParams) -> None:
    where = storage.join(url, "encoder.safetensors")
    if storage.exists(where):
        return
    source = open_store(patches)
    try:
        encoder = fit_encoder(params.name, _sample(source), source.bands, params.dim, params.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    tensors = {name: torch.from_numpy(array) for name, array in encoder.arrays().items()}
    storage.create(where, serialise(tensors))


def _sample(source: Patches) -> NDArray[np.float32]:
    images = len(source.manifest)
    if images <= RUNS * RUN:
        return source.reflectance(slice(0, images))
    starts = np.linspace(0, images - RUN, RUNS).astype(int).tolist()
    return np.concatenate([source.reflectance(slice(i, i + RUN)) for i in starts])


def _create(url: str, views: int, images: int, dim: int) -> None:
    group = zarr.open_group(storage.zarr_store(storage.join(url, "features.zarr")), mode="a")
    if "features" not in group:
        group.create_array(
            "features",
            shape=(views, images, dim),
            dtype="f4",
            chunks=(1, min(SHARD, images), dim),
            fill_value=np.nan,
            dimension_names=("view", "image", "feature"),
        )


@lru_cache(maxsize=2)
def open_store(patches: str) -> Patches:
    """The patches, opened once per worker process; a finished store never changes."""
    return open_patches(patches)


@lru_cache(maxsize=2)
def open_encoder(url: str, patches: str, name: str) -> ImageEncoder:
    """The fitted encoder of the features at `url`, loaded once per worker process."""
    tensors = parse(storage.read(storage.join(url, "encoder.safetensors")))
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    return load_encoder(name, arrays, open_store(patches).bands)


def view_of(images: NDArray[np.float32], view: int) -> NDArray[np.float32]:
    """A view of images, (n, band, y, x).

    Views 0 to 7 are the symmetries of the square, view 0 the images themselves: from above no side is up. Views 8
    to 15 are those of a corner of three quarters of the side, another one for each quarter turn.
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
    """Encodes one view of one shard of patches and writes it as one object."""
    view, shard = unit
    images = len(open_store(patches).manifest)
    rows = slice(shard * SHARD, min((shard + 1) * SHARD, images))
    reflectance = view_of(open_store(patches).reflectance(rows), view)
    _array(url, "r+")[view, rows] = open_encoder(url, patches, name).encode(reflectance)


def _array(url: str, mode: Any) -> zarr.Array:
    return zarr.open_array(storage.zarr_store(storage.join(url, "features.zarr", "features")), mode=mode)


class StoredFeatures:
    """The features at a URL as training reads them: whole shards, of which the last used stay in memory."""

    def __init__(self, url: str, images: int) -> None:
        """Opens them, to keep two windows of `images`: a batch can span the end of one and the start of the next."""
        self._stored = _array(url, "r")
        self.shape: tuple[int, int, int] = self._stored.shape
        self.run = self._stored.chunks[1]
        self._shard = lru_cache(maxsize=2 * -(-images // self.run))(self._read)
        self._readers = ThreadPoolExecutor(READERS)

    def _read(self, number: int) -> NDArray[np.float32]:
        view, shard = divmod(number, -(-self.shape[1] // self.run))
        return np.asarray(self._stored[view, shard * self.run : (shard + 1) * self.run])

    def take(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features of images, each in the view of the same index, (n, feature)."""
        numbers, which = np.unique(views * -(-self.shape[1] // self.run) + rows // self.run, return_inverse=True)
        out = np.empty((len(rows), self.shape[2]), np.float32)
        for i, shard in enumerate(self._readers.map(self._shard, numbers.tolist())):
            at = np.flatnonzero(which == i)
            out[at] = shard[rows[at] % self.run]
        return out
