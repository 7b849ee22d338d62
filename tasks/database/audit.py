"""Audits a database: are its numbers sound, and do key, value and place of a row belong to one image?

With the patches and the checkpoint, a random sample is encoded again and compared. Without them, as for an imported
database, statistics are used. The same comparison with a shuffled sample must fail: a check that cannot fail tells
nothing.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.cards import Card, kind_of, read_card
from tasks.core.alignment import alignment
from tasks.core.encoders.harmonics import spherical_harmonics
from tasks.core.encoders.images import ImageEncoder
from tasks.database.store import UNIT_TOLERANCE, Database, check, open_database, repeated
from tasks.findings import Finding
from tasks.model.checkpoint import keys_of
from tasks.model.features import encode_rows, image_encoder, load, open_encoder, open_store
from tasks.products import CheckpointCard, FeaturesCard, PatchesCard

TOLERANCE = 1e-3  # largest relative difference: float32 in batches of another size, on another machine
DEGREE = 12  # degrees of harmonics that represent a place


def audit_database(
    database: str, patches: str | None = None, checkpoint: str | None = None, sample: int = 64, seed: int = 0
) -> list[Finding]:
    """Checks a database.

    Args:
        database: URL of the database.
        patches: URL of the patches that it was encoded from; needs `checkpoint` too.
        checkpoint: URL of the checkpoint that made its keys.
        sample: Number of images to encode again.
        seed: Seed of the sample.

    Returns:
        The findings, in order.

    Raises:
        UserError: One of the products does not exist, or patches are given without a checkpoint, or for a joined
            database.
    """
    if patches is not None and checkpoint is None:
        raise UserError("patches are encoded again by a checkpoint: give --checkpoint too")
    data = open_database(database)
    if patches is not None and data.card.origins:
        samples = ", ".join(origin.database for origin in data.card.origins)
        raise UserError(
            f"{database} is joined of {samples}: audit each of these with its own patches, and this one without"
        )
    findings = [*numbers(data, database), fingerprint_of(data.card.checkpoint, CheckpointCard, checkpoint)]
    findings.append(fingerprint_of(data.card.patches, PatchesCard, patches))
    if patches is None or checkpoint is None or (data.row_ids < 0).all():  # imported: no row leads back to an image
        return [*findings, *by_statistics(data, seed)]
    if any(finding.passed is False for finding in findings):
        return [*findings, Finding("images", None, "none encoded again: first mend what failed")]
    return [*findings, *by_encoding(data, patches, checkpoint, sample, seed)]


def numbers(data: Database, database: str) -> Iterator[Finding]:
    """Checks that retrieval can use the arrays, and that no image is there twice."""
    try:
        check(data.keys, data.values, data.locations, database, data.weights)
        length = float(np.abs(np.linalg.norm(data.keys, axis=1) - 1).max())
        yield Finding("numbers", length < UNIT_TOLERANCE, f"{len(data.keys)} images, keys of length 1 to {length:.1g}")
    except UserError as error:
        yield Finding("numbers", False, str(error))
    twice = int(repeated(data.locations, data.values).sum())
    if twice and (data.row_ids < 0).all():  # published files have some, which is no fault of the import
        yield Finding("duplicates", None, f"{twice} images are there twice, as in the file: each counts twice")
    else:
        yield Finding("duplicates", not twice, f"{twice} images are there twice")


def fingerprint_of(recorded: str | None, model: type[Card], url: str | None) -> Finding:
    """Checks that the product at `url` is the one that the database's card names, if it names one."""
    kind = kind_of(model)
    if url is None or recorded is None:
        return Finding(kind, None, f"not given; the card says {recorded}" if recorded else "the card names none")
    given = read_card(url, model).fingerprint
    return Finding(kind, given == recorded, f"{given} is given, the card says {recorded}")


def by_encoding(data: Database, patches: str, checkpoint: str, sample: int, seed: int) -> Iterator[Finding]:
    """Checks a random sample by encoding it again, and that the same sample shuffled fails."""
    manifest = open_store(patches).manifest
    if len(manifest) == len(data.row_ids):
        same = np.array_equal(data.row_ids, manifest["row_id"])
    else:
        same = False
    yield Finding("row ids", same, f"{len(data.row_ids)} in the database, {len(manifest)} in the manifest")
    if not same:
        return
    apart = float(np.abs(data.locations - manifest[["lon", "lat"]].to_numpy()).max())
    yield Finding("places", apart == 0, f"at most {apart:g} degrees from the manifest's")
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(manifest), min(sample, len(manifest)), replace=False)
    keys, values = encode_again(data, patches, checkpoint, rows)
    for name, stored, again in (("keys", data.keys[rows], keys), ("values", data.values[rows], values)):
        yield Finding(f"{name} encoded again", *compare(stored, again))
        passed, detail = compare(stored, np.roll(again, 1, axis=0))
        yield Finding(f"{name} shuffled, must differ", not passed, detail)


def encode_again(data: Database, patches: str, checkpoint: str, rows: NDArray) -> tuple[NDArray, NDArray]:
    """Returns keys and values of some patches, by the encoders that the database's card names."""
    source, model = open_store(patches), load(checkpoint)
    encoder = image_encoder(model, patches)
    other = values_encoder(data, patches)
    keys, values = [], []
    for row in rows.tolist():
        seen = encode_rows(encoder, source, slice(row, row + 1))
        keys.append(keys_of(model, seen))
        values.append(seen if other is None else encode_rows(other, source, slice(row, row + 1)))
    return np.concatenate(keys), np.concatenate(values)


def values_encoder(data: Database, patches: str) -> ImageEncoder | None:
    """Returns the encoder of the values, or None where it is the checkpoint's own.

    Raises:
        UserError: The features are no longer where the card says.
    """
    made = data.card.values
    if not (made.features and made.encoder):
        return None
    read_card(made.features, FeaturesCard)
    return open_encoder(made.features, patches, made.encoder.name)


def compare(stored: NDArray, again: NDArray) -> tuple[bool, str]:
    """Tells whether all rows are the same up to rounding, and how many are."""
    apart = np.linalg.norm(stored - again, axis=1) / np.linalg.norm(again, axis=1).clip(1e-12)
    good = int((apart < TOLERANCE).sum())
    return good == len(apart), f"{good} of {len(apart)} the same; largest relative difference {apart.max():.1g}"


def by_statistics(data: Database, seed: int) -> Iterator[Finding]:
    """Checks without images that keys, values and places go together, and that these checks can fail."""
    if len(data.keys) and np.isfinite(data.values).all():
        places = spherical_harmonics(data.locations, DEGREE)
        yield from together("values and keys", data.values, data.keys, seed)
        yield from together("places and keys", places, data.keys, seed)
        yield from together("places and values", places, data.values, seed)


def together(name: str, source: NDArray, target: NDArray, seed: int) -> Iterator[Finding]:
    """Checks that two tables belong together row by row, and that they do not once one is shuffled."""
    try:
        found = alignment(source, target, seed)
        rng = np.random.default_rng((seed, len(target)))  # not the generator that may have shuffled the table
        canary = alignment(source, rng.permutation(target), seed)
    except ValueError as error:
        yield Finding(name, None, str(error))
        return
    where = "".join(f"; rows {start} to {stop} do not belong together" for start, stop in found.broken)
    detail = f"cosine {found.score:.3f}, by chance {found.shuffled:.3f} ± {found.error:.3f}"
    yield Finding(name, found.aligned, detail + where)
    detail = f"cosine {canary.score:.3f}, by chance {canary.shuffled:.3f} ± {canary.error:.3f}"
    yield Finding(f"{name} shuffled, must differ", not canary.aligned, detail)
