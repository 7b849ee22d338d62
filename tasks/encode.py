"""Runs the encode step: keys and values of all patches, in whole shards."""

from functools import partial
from typing import Any

from distributed import Client

from infra import storage
from tasks.artifacts import keep_picture
from tasks.cards import fingerprint, is_finished, product_url, read_card
from tasks.database.heads import measured
from tasks.database.store import create_database, finish_database, write_rows, write_weights, written_shards
from tasks.model.checkpoint import describe, keys_of
from tasks.model.features import encode_features, encode_rows, identity, image_encoder, load, open_store, read_features
from tasks.newest import inherit
from tasks.params import EncodeParams
from tasks.patches.design import weights_of
from tasks.plots.charts import kernel_chart
from tasks.products import CheckpointCard, DatabaseCard, FeaturesCard, PatchesCard, Values
from tasks.units import run_units

OWN = "checkpoint"  # name of the values' encoder that means the checkpoint's own


def encode_database(client: Client, patches: str, checkpoint: str, params: EncodeParams) -> str:
    """Encodes patches into keys and values, and resumes what an earlier run began.

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
    source, space = read_card(patches, PatchesCard), read_card(checkpoint, CheckpointCard)
    made_of = {"patches": source.fingerprint, "checkpoint": space.fingerprint, **params.model_dump()}
    made_of["values"] = identity(params.values)
    manifest = open_store(patches).manifest
    weights = weights_of(patches, source, manifest[["lon", "lat"]].to_numpy("f8"))
    if weights is not None:
        made_of["weights"] = "by class"  # beside a database of before, in which each image counts 1
    url = product_url("databases", made_of)
    if is_finished(url):
        show_heads(url)
        inherit(url, patches)
        return url
    encoder = image_encoder(load(checkpoint), patches)
    features, seen = None, describe(encoder)
    if params.values.name != OWN:
        features = encode_features(client, patches, params.values)
        seen = read_card(features, FeaturesCard).encoder
    images, weighted = len(manifest), weights is not None
    create_database(url, images, load(checkpoint).location.dim, seen.dim, params.shard_rows, weighted=weighted)
    done = written_shards(url)
    shards = [i for i in range(-(-images // params.shard_rows)) if i not in done]
    job = partial(encode_shard, url, patches, checkpoint, features, params.shard_rows)
    run_units(client, job, shards, label="encode", there=len(done))
    told: dict[str, Any] = {}
    if weights is not None:
        write_weights(url, weights)
        told["weighted"] = True
    finish_database(
        url,
        measure=partial(measured, load(checkpoint).location),
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        patches=source.fingerprint,
        checkpoint=space.fingerprint,
        encoder=space.encoder,
        values=Values(encoder=seen, features=features),
        line=source.line,
        attribution=source.attribution,
        **told,
    )
    show_heads(url)
    inherit(url, patches)
    return url


def show_heads(url: str) -> None:
    """Keeps a picture of how well heads restore a database's images beside it, unless it is there or none is told."""
    card, picture = read_card(url, DatabaseCard), storage.join(url, "heads.png")
    if card.heads and not storage.exists(picture):
        title = f"Heads that fit {card.images:,} images, chosen without labels"
        caption = f"Share of the variance of images' values that the other images restore. {card.attribution}."
        keep_picture(picture, kernel_chart(card.heads, title, caption), "heads", title)


def encode_shard(url: str, patches: str, checkpoint: str, features: str | None, shard_rows: int, shard: int) -> None:
    """Encodes one shard of patches and writes it whole. Values come from `features` where these are given."""
    source, model = open_store(patches), load(checkpoint)
    start = shard * shard_rows
    rows = slice(start, min(start + shard_rows, len(source.manifest)))
    places = source.manifest.iloc[rows]
    seen = encode_rows(image_encoder(model, patches), source, rows)
    arrays = {
        "keys": keys_of(model, seen),
        "values": seen if features is None else read_features(features, rows),
        "locations": places[["lon", "lat"]].to_numpy("f8"),
        "row_ids": places["row_id"].to_numpy("i8"),
    }
    write_rows(url, start, arrays)
