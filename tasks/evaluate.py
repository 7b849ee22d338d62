"""The evaluate step: the paper's comparison for one database, on random and on spatially blocked splits."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import storage
from tasks.artifacts import keep_picture, keep_table
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.location import LocationEncoder
from tasks.core.probes import blocked_split, random_split, score
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.labels import LabelSet, demo_labels
from tasks.params import EvaluateParams
from tasks.pictures import score_chart
from tasks.publish import read_pair
from tasks.tiles import load
from tasks.units import progress

METHODS = {
    "top-1": Method("top1"),
    "top-k": Method("topk"),
    "RANGE": Method("range"),
    "RANGE+": Method("range+"),
}


def evaluate_database(checkpoint: str, database: str, params: EvaluateParams) -> str:
    """Scores every embedder on every task, and stores the report.

    Args:
        checkpoint: URL of the checkpoint.
        database: URL of the database encoded with it.
        params: Which labels and splits.

    Returns:
        The URL of the report: `scores.json`, `scores.md`, `scores.csv` and `scores.png`.
    """
    card = read_pair(checkpoint, database)
    made_of = {"database": card["fingerprint"], **params.model_dump()}
    url = product_url("reports", made_of)
    if is_finished(url):
        return url
    encoder, index = load(checkpoint, database)
    sets = demo_labels(params.points, params.seed)
    rows: list[dict[str, Any]] = []
    with progress("evaluate", len(sets) * (len(METHODS) + 2)) as advance:
        for labels in sets:
            for name, features in embed_all(encoder, index, labels.lonlat).items():
                rows.append(score_row(labels, name, features, params))
                advance(1)
    report(url, pd.DataFrame(rows), card.get("attribution", ""))
    write_card(url, "report", fingerprint=fingerprint(made_of), made_of=made_of, scores=rows)
    return url


def embed_all(
    encoder: LocationEncoder, index: RetrievalIndex, lonlat: NDArray[np.float64]
) -> dict[str, NDArray[np.float32]]:
    """The features of every embedder at the places; the location encoder runs once."""
    location = encoder.embed(lonlat)
    found = {"coordinates": lonlat.astype(np.float32), "location encoder": location}
    for name, method in METHODS.items():
        found[name] = np.concatenate([index.retrieve(location, lonlat, method), location], axis=1)
    return found


def score_row(labels: LabelSet, name: str, features: NDArray[np.float32], params: EvaluateParams) -> dict[str, Any]:
    """One embedder's scores on one task."""
    n = len(labels.labels)
    blocked = blocked_split(labels.lonlat, params.block_degrees)
    return {
        "task": labels.name,
        "metric": "accuracy" if labels.kind == "classification" else "R²",
        "embedder": name,
        "random": round(score(features, labels.labels, labels.kind, random_split(n)), 4),
        "blocked": round(score(features, labels.labels, labels.kind, blocked), 4),
        "n": n,
    }


def report(url: str, table: pd.DataFrame, attribution: str) -> None:
    """Stores the scores as JSON, CSV, Markdown and a picture."""
    storage.write_json(storage.join(url, "scores.json"), table.to_dict("records"))
    storage.write(storage.join(url, "scores.csv"), table.to_csv(index=False).encode())
    caption = (
        f"Linear probes; wide pale bars: random split, narrow full bars: 10-degree blocks held out. {attribution}."
    )
    keep_table(storage.join(url, "scores.md"), markdown(table), "scores", "Scores of linear probes")
    picture = score_chart(table, "What the embeddings know", caption)
    keep_picture(storage.join(url, "scores.png"), picture, "score-chart", "Scores of linear probes")


def markdown(table: pd.DataFrame) -> str:
    """Embedders by tasks, `random / blocked`; the best blocked score of a task in bold."""
    tasks = list(table["task"].unique())
    best = table.groupby("task")["blocked"].max()
    lines = ["| random / blocked | " + " | ".join(f"{t} ({_metric(table, t)})" for t in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    for name, rows in table.groupby("embedder", sort=False):
        cells = [_cell(rows[rows["task"] == task].iloc[0], best[task]) for task in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _metric(table: pd.DataFrame, task: str) -> str:
    return str(table.loc[table["task"] == task, "metric"].iloc[0])


def _cell(row: pd.Series, best: float) -> str:
    text = f"{row['random']:.2f} / {row['blocked']:.2f}"
    return f"**{text}**" if row["blocked"] == best else text
