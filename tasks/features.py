"""Image features, computed once: training reads them and the database keeps them as values.

`features/<id>/` holds `encoder.safetensors` (the image encoder, fitted to a sample of the patches),
`features.zarr` (an array `features` (image, feature) float32, one object per shard) and `card.json`.
"""

import hashlib
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import zarr
from distributed import Client
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise

from infra import storage
from infra.errors import UserError
from tasks.cards import fingerprint, is_finished, product_url, read_card, write_card
from tasks.checkpoint import describe
from tasks.core.encoders import fit_encoder, load_encoder
from tasks.core.images import ImageEncoder, take_bands
from tasks.foreign import read_file
from tasks.params import EncoderParams
from tasks.patches import Patches, open_patches
from tasks.units import log, run_units

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
    made_of = {"patches": read_card(patches, "patches")["fingerprint"], **identity(params)}
    url = product_url("features", made_of)
    if is_finished(url):
        return url
    images = len(open_store(patches).manifest)
    _prepare(url, patches, params)
    encoder = open_encoder(url, patches, params.name)
    _create(url, images, encoder.dim)
    shards = range(-(-images // SHARD))
    done = {int(n) for n in storage.names(storage.join(url, "features.zarr", "features", "c")) if n.isdigit()}
    run_units(
        client,
        partial(encode_shard, url, patches, params.name),
        [i for i in shards if i not in done],
        label="features",
    )
    write_card(
        url, "features", fingerprint=fingerprint(made_of), made_of=made_of, images=images, encoder=describe(encoder)
    )
    return url


def identity(params: EncoderParams) -> dict[str, Any]:
    """What decides an encoder: its parameters, with the digest of its weights in place of where they are."""
    if params.weights is None:
        return params.model_dump()
    digest = hashlib.sha256(read_file(_weights_file(params.weights), "a .safetensors")).hexdigest()
    return {**params.model_dump(), "weights": digest}


def _weights_file(place: str) -> str:
    """The .safetensors itself, where a checkpoint's directory was given."""
    url = storage.as_url(place)
    inside = storage.join(url, "model.safetensors")
    return inside if not storage.exists(url) and storage.exists(inside) else place


def read_weights(place: str) -> dict[str, NDArray]:
    """Weights of an image encoder, by name.

    Args:
        place: Path or URL of a .safetensors, or of a checkpoint, whose image encoder is taken.

    Raises:
        UserError: None is there, or it is no such file.
    """
    file = _weights_file(place)
    try:
        tensors = parse(read_file(file, "a .safetensors"))
    except SafetensorError as error:
        raise UserError(f"{place} is no .safetensors ({error}): convert the weights to one first") from error
    arrays = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}
    if file == place:
        return arrays
    return {name.removeprefix("encoder."): a for name, a in arrays.items() if name.startswith("encoder.")}


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
    storage.create(where, serialise(tensors))


def check_takes(encoder: ImageEncoder, source: Patches, taker: str) -> None:
    """Refuses patches without a band that the encoder takes, and warns of another resolution than its own.

    Raises:
        UserError: A band is missing.
    """
    missing = [band for band in encoder.bands if band not in source.bands]
    if missing:
        raise UserError(
            f"{source.url} has the bands {', '.join(source.bands)} and {taker} takes "
            f"{', '.join(encoder.bands)}: sample patches with {', '.join(missing)}, or use another encoder"
        )
    metres = source.card.get("made_of", {}).get("resolution_m")
    if encoder.resolution_m and metres and metres != encoder.resolution_m:
        log().warning("%s was trained on pixels of %g m; these have %g m", encoder.name, encoder.resolution_m, metres)


def encode_rows(encoder: ImageEncoder, source: Patches, rows: slice) -> NDArray[np.float32]:
    """Features of some patches, (n, feature), from the bands that the encoder takes."""
    return encoder.encode(take_bands(source.reflectance(rows), source.bands, encoder.bands))


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
    values = encode_rows(open_encoder(url, patches, name), open_store(patches), rows)
    features = zarr.open_array(storage.zarr_store(storage.join(url, "features.zarr", "features")), mode="r+")
    features[rows] = values


def read_features(url: str, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Rows of the features at `url`, (n, feature)."""
    features = zarr.open_array(storage.zarr_store(storage.join(url, "features.zarr", "features")), mode="r")
    return np.asarray(features[rows], np.float32)
