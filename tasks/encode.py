"""The encode step: keys and values of all patches, in whole shards."""

from functools import lru_cache, partial

from distributed import Client

from infra.errors import UserError
from tasks.cards import fingerprint, is_finished, product_url, read_card
from tasks.checkpoint import Checkpoint, keys_of, load_checkpoint
from tasks.core.images import ImageEncoder
from tasks.database import create_database, finish_database, write_rows, written_shards
from tasks.features import open_store
from tasks.params import EncodeParams
from tasks.units import run_units


def encode_database(client: Client, patches: str, checkpoint: str, params: EncodeParams) -> str:
    """Encodes patches into keys and values, resuming what an earlier run began.

    Args:
        client: The Dask cluster.
        patches: URL of the patches.
        checkpoint: URL of the checkpoint whose space the keys live in.
        params: How to encode.

    Returns:
        The URL of the database.

    Raises:
        UserError: The checkpoint takes other bands, has no image side, or a patch could not be encoded.
    """
    source, space = read_card(patches, "patches"), read_card(checkpoint, "checkpoint")
    made_of = {"patches": source["fingerprint"], "checkpoint": space["fingerprint"], **params.model_dump()}
    url = product_url("databases", made_of)
    if is_finished(url):
        return url
    model = load(checkpoint)
    encoder = image_encoder(model, patches)
    images = len(open_store(patches).manifest)
    create_database(url, images, model.location.dim, encoder.dim, params.shard_rows)
    done = written_shards(url)
    shards = [i for i in range(-(-images // params.shard_rows)) if i not in done]
    run_units(client, partial(encode_shard, url, patches, checkpoint, params.shard_rows), shards, label="encode")
    finish_database(
        url,
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        patches=source["fingerprint"],
        checkpoint=space["fingerprint"],
        encoder=space["encoder"],
        attribution=source.get("attribution", ""),
    )
    return url


@lru_cache(maxsize=2)
def load(checkpoint: str) -> Checkpoint:
    """The checkpoint, loaded once per worker process."""
    return load_checkpoint(checkpoint)


def image_encoder(model: Checkpoint, patches: str) -> ImageEncoder:
    """The checkpoint's image encoder, after checking that it takes the bands of the patches.

    Raises:
        UserError: They differ, or the checkpoint has no image side.
    """
    if model.encoder is None:
        raise UserError(
            "this checkpoint was imported and encodes no images: import the database that was published "
            "with it, or train a checkpoint on your patches"
        )
    bands = tuple(open_store(patches).bands)
    if bands != tuple(model.encoder.bands):
        raise UserError(
            f"{patches} has the bands {', '.join(bands)} and the checkpoint takes "
            f"{', '.join(model.encoder.bands)}: train a checkpoint on these patches, or sample those bands"
        )
    return model.encoder


def encode_shard(url: str, patches: str, checkpoint: str, shard_rows: int, shard: int) -> None:
    """Encodes one shard of patches and writes it whole."""
    source, model = open_store(patches), load(checkpoint)
    start = shard * shard_rows
    rows = slice(start, min(start + shard_rows, len(source.manifest)))
    places = source.manifest.iloc[rows]
    values = image_encoder(model, patches).encode(source.reflectance(rows))
    arrays = {
        "keys": keys_of(model, values),
        "values": values,
        "locations": places[["lon", "lat"]].to_numpy("f8"),
        "row_ids": places["row_id"].to_numpy("i8"),
    }
    write_rows(url, start, arrays)
