"""Runs ablations: measures what one choice of the retrieval is worth, with everything else unchanged.

========= ================================================================================
choice    what is varied
========= ================================================================================
strategy  no retrieval, the best image, the mean of the 10 best, RANGE, RANGE+
k         number of images that are averaged
temperature  temperature of RANGE's softmax
beta      share of the semantic half in RANGE+
size      number of images of the database, drawn at random
values    databases of the same checkpoint with other image encoders for the values (`--databases`)
variants  RANGE+ in full, as int8, and its visual part in 64 principal components
========= ================================================================================
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.artifacts import keep_picture
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.compact import Projection
from tasks.core.encoders.location import LocationEncoder
from tasks.core.quantize import Scale
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database.store import read_pair
from tasks.evaluation.embedders import Embeddings, Lonlat, Named
from tasks.evaluation.label_tables import UNTOLD, counted, label_sets
from tasks.evaluation.score_tables import keep_scores
from tasks.evaluation.scoring import digest, find_references, score_all
from tasks.grid.tiles import load
from tasks.params import AblateParams, Choice
from tasks.plots.charts import ablation_chart
from tasks.products import AblationCard
from tasks.tables.regions import decides, find_region
from tasks.units import progress

STEPS: dict[str, tuple[float, ...]] = {
    "k": (1, 2, 5, 10, 20, 50, 100),
    "temperature": (1, 4, 8, 12, 15, 20, 40, 80),
    "beta": (0, 0.25, 0.5, 0.75, 1),
    "size": (100, 300, 1000, 3000, 10_000, 30_000),
}
FIT: dict[str, tuple[float, float, bool]] = {  # least, most, and whether steps are whole numbers
    "k": (1, 1e7, True),
    "temperature": (1e-6, 1e6, False),
    "beta": (0, 1, False),
    "size": (1, 1e7, True),
}
METHODS = {
    "no retrieval": Method("none"),
    "top-1": Method("top1"),
    "top-10": Method("topk", k=10),
    "RANGE": Method("range"),
    "RANGE+": Method("range+"),
}
COMPACT_DIMS = 64  # principal components of the compact variants


def ablate_database(choice: Choice, checkpoint: str, database: str, params: AblateParams) -> str:
    """Scores the variants of one choice on every task, and stores the report.

    Args:
        choice: The choice to vary.
        checkpoint: URL of the checkpoint.
        database: URL of the database encoded with it.
        params: Which variants, labels and splits.

    Returns:
        The URL of the report: `ablation.json`, `.md`, `.csv` and `.png`.

    Raises:
        UserError: The choice lacks what it needs.
    """
    params, card = counted(params), read_pair(checkpoint, database)
    variants = list(variants_of(choice, checkpoint, database, params))
    find_references(variants, params.reference)
    sets = label_sets(params)
    labels = {one.name: digest(one) for one in sets}
    made_of = {"choice": choice, "database": card.fingerprint, "labels": labels}
    made_of |= params.model_dump(mode="json", exclude=UNTOLD)
    made_of |= decides(find_region(params.region, params.buffer_km))
    url = product_url("ablations", made_of)
    if is_finished(url):
        return url
    with progress(f"ablate {choice}", len(variants)) as advance:
        table = score_all(sets, variants, params, advance).table
    name = f"Ablation of {choice}"
    keep_scores(url, "ablation", table, f"ablation-{choice}", name)
    caption = f"Linear probes; deviation over splits. {card.attribution}"
    keep_picture(storage.join(url, "ablation.png"), ablation_chart(table, name, caption), f"ablation-{choice}", name)
    write_card(url, AblationCard(fingerprint=fingerprint(made_of), made_of=made_of))
    return url


def variants_of(choice: Choice, checkpoint: str, database: str, params: AblateParams) -> Iterator[Named]:
    """Yields the embedders to compare; refuses missing inputs before the work."""
    _check_steps(choice, params.steps)
    encoder, index = load(checkpoint, database)
    if choice == "values":
        yield from _values(checkpoint, [database, *params.databases])
    elif choice == "variants":
        yield from _variants(encoder, index)
    else:
        steps = tuple(dict.fromkeys(params.steps or STEPS.get(choice, ())))
        yield from _steps(choice, encoder, index, steps, params.seed)


def _check_steps(choice: Choice, steps: tuple[float, ...]) -> None:
    if steps and choice not in FIT:
        raise UserError(f"the ablation of {choice} has no steps: give --steps for one of {', '.join(FIT)}")
    for step in steps:
        least, most, whole = FIT[choice]
        if not least <= step <= most or (whole and step % 1):
            numbers = "whole numbers" if whole else "numbers"
            raise UserError(f"{choice} cannot be {step:g}: give --steps of {numbers} from {least:g} to {most:,.0f}")


def _steps(
    choice: Choice, encoder: LocationEncoder, index: RetrievalIndex, steps: tuple[float, ...], seed: int
) -> Iterator[Named]:
    if choice == "strategy":
        for name, method in METHODS.items():
            yield _named(name, encoder, index, method)
    elif choice == "k":
        for k in dict.fromkeys(min(int(step), len(index)) for step in steps):
            yield _named(str(k), encoder, index, Method("topk", k=k))
    elif choice == "temperature":
        for step in steps:
            yield _named(f"{step:g}", encoder, index, Method("range", temperature=step))
    elif choice == "beta":
        for step in steps:
            yield _named(f"{step:g}", encoder, index, Method("range+", beta=step))
    else:
        order = np.random.default_rng(seed).permutation(len(index))
        for size in dict.fromkeys([*(int(step) for step in steps if step < len(index)), len(index)]):
            yield Named(f"{size:,}", partial(_of_part, encoder, index, np.sort(order[:size])))


def _named(name: str, encoder: LocationEncoder, index: RetrievalIndex, method: Method) -> Named:
    return Named(name, lambda lonlat: embed(encoder, index, lonlat, method))


def _of_part(encoder: LocationEncoder, index: RetrievalIndex, rows: NDArray[np.int64], lonlat: Lonlat) -> Embeddings:
    """Embeds places by RANGE+ from some images of the database."""
    keys, values = index.keys[rows].numpy(), index.values[rows].numpy()
    counts = None if index.counts is None else index.counts[rows]
    part = RetrievalIndex(keys, values, index.locations[rows], queries=len(lonlat), weights=counts)
    return embed(encoder, part, lonlat, Method())


def _values(checkpoint: str, databases: list[str]) -> Iterator[Named]:
    if len(databases) < 2:
        raise UserError(
            "there is one database, and so one value encoder: make others with `rangegrid encode PATCHES CHECKPOINT "
            "--values-name NAME`, and name them with --databases"
        )
    for url in databases:
        encoder, index = load(checkpoint, url)
        made = read_pair(checkpoint, url).values.encoder
        name = made.name if made else "values"
        yield _named(f"{name} {url.rstrip('/').rpartition('/')[2]}", encoder, index, Method())


def _variants(encoder: LocationEncoder, index: RetrievalIndex) -> Iterator[Named]:
    full = partial(embed, encoder, index, method=Method())
    yield Named("full", full)
    values = index.values.numpy()
    yield Named("int8", lambda lonlat: int8(full(lonlat), values.shape[1]))
    projection = Projection.fit(values, min(COMPACT_DIMS, *values.shape), index.counts)
    keys = index.keys.numpy()
    compact = RetrievalIndex(keys, projection.apply(values), index.locations, weights=index.counts)
    small: Callable[..., Any] = partial(embed, encoder, compact, method=Method())
    dims = compact.values.shape[1]
    yield Named(f"{dims} components", small)
    yield Named(f"{dims} components, int8", lambda lonlat: int8(small(lonlat), dims))


def int8(vectors: Embeddings, visual: int) -> Embeddings:
    """Returns vectors as a grid of int8 gives them back, with one scale each for the visual and the location part."""
    stored = []
    for part in np.split(vectors, [visual], axis=1):
        scale = Scale.fit(part)
        stored.append(scale.decode(scale.encode(part)))
    return np.concatenate(stored, axis=1)
