"""Image features, computed once: training reads them and the database keeps them as values.

`features/<id>/` holds `encoder.safetensors` (the image encoder, fitted to a sample of the patches),
`features.zarr` (an array `features` (image, feature) float32, one object per shard) and `card.json`.
"""

from functools import lru_cache, partial

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
RUNS, RUN = 40, 50  # images that an encoder is fitted to: runs of neighbours, spread over the whole store


def encode_features(client: Client, patches: str, params: EncoderParams) -> str:
    """Encodes all patches by one encoder, resuming what an earlier run began.

    Args:
        client: The Dask cluster.
        patches: URL of the patches.
        params: The encoder.

    Returns:
        The URL of the features.
    """
    made_of = {"patches": read_card(patches, "patches")["fingerprint"], **params.model_dump()}
    url = product_url("features", made_of)
    if is_finished(url):
        return url
    images = len(open_store(patches).manifest)
    _fit(url, patches, images, params)
    _create(url, images, params.dim)
    shards = range(-(-images // SHARD))
    done = {int(n) for n in storage.names(storage.join(url, "features.zarr", "features", "c")) if n.isdigit()}
    run_units(
        client,
        partial(encode_shard, url, patches, params.name),
        [i for i in shards if i not in done],
        label="features",
    )
    write_card(url, "features", fingerprint=fingerprint(made_of), made_of=made_of, images=images)
    return url


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


def _create(url: str, images: int, dim: int) -> None:
    group = zarr.open_group(storage.zarr_store(storage.join(url, "features.zarr")), mode="a")
    if "features" not in group:
        group.create_array(
            "features", shape=(images, dim), dtype="f4", chunks=(min(SHARD, images), dim), fill_value=np.nan
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


def encode_shard(url: str, patches: str, name: str, shard: int) -> None:
    """Encodes one shard of patches and writes it as one object."""
    images = len(open_store(patches).manifest)
    rows = slice(shard * SHARD, min((shard + 1) * SHARD, images))
    values = open_encoder(url, patches, name).encode(open_store(patches).reflectance(rows))
    features = zarr.open_array(storage.zarr_store(storage.join(url, "features.zarr", "features")), mode="r+")
    features[rows] = values


def read_features(url: str, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Rows of the features at `url`, (n, feature)."""
    features = zarr.open_array(storage.zarr_store(storage.join(url, "features.zarr", "features")), mode="r")
    return np.asarray(features[rows], np.float32)
