"""How far it goes: what each choice in the model is worth on the demo planet, and how that compares with GeoCLIP.

`python -m tests.benchmarks.study` starts the sandbox in `.sandbox`, samples 40,000 patches there once, prints a
Markdown table per question and draws pictures into `docs/`; names of questions as arguments ask only those. Whatever
was computed stays in `.sandbox/study`: an interrupted study goes on, and a new question costs only what it alone
needs. Real labels come from the folder that `RANGEGRID_FIXTURES` names.

Labels are read by the probes alone, never by what is probed.
"""

import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from infra import clusters, sandbox
from tasks.core.compact import Projection
from tasks.core.encoders.images import Images
from tasks.core.encoders.location import PlaceEncoder
from tasks.core.encoders.rcf import Scale, fit_rcf
from tasks.core.ensemble import rebuild, together
from tasks.core.probes import SEED, Kind, Split, block_of, score
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.core.training import Pairs, Trainer, hold_out, train
from tasks.evaluation.labels import demo_labels
from tasks.model.features import RUN, RUNS, view_of
from tasks.model.fitting import BLOCK_DEGREES, new_trainer
from tasks.model.geoclip import embed_geoclip
from tasks.model.members import seeded
from tasks.params import EncoderParams, SampleParams, TrainParams
from tasks.patches.store import Patches, open_patches
from tasks.plots.charts import score_chart
from tasks.plots.style import INK, SECOND
from tasks.sample import sample_patches
from tests.core.feature_array import FeatureArray

SANDBOX = Path(".sandbox")
HOME = SANDBOX / "study"
SAMPLE = SampleParams(patches=40_000, patch_pixels=48, resolution_m=5000, bands=("B02", "B03", "B04", "B08"))
POINTS = 3000  # of a task with real labels, at most, drawn at random
MANY = 10_000  # where GeoCLIP is compared
LABEL_SEED = 5  # of label places: the sample's is 0 and the report's 2, so that no choice is made on those
BLOCKS = 5  # blocked splits, whose mean counts
SEEDS = (0, 1, 2)  # of what is trained
COMPARISON = "GeoCLIP"
PICTURE, CHART = Path("docs/geoclip.png"), Path("docs/study.png")
SHOWN = 0.63, 0.75  # scores in the chart; what is below leaves its panel
LOCAL = "California housing"  # one state alone, so left out of the means
NOT_THERE = (float("nan"), float("nan"))
CAPTION = (
    "Linear probes; pale: random split; full: blocks of 10 degrees (housing: 1 degree) held out, mean of 5 splits."
)

Embed = Callable[[NDArray[np.float64]], NDArray[np.float32]]
Answer = dict[str, tuple[tuple[float, float], tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    """One configuration."""

    train: TrainParams = field(default_factory=TrainParams)
    """Architecture, schedule, image encoder, views and mask."""
    method: Method = field(default_factory=Method)
    """Retrieval."""
    images: int = 10_000
    """Size of the database, and of the training set."""
    pixels: int = 32
    """Side of a patch, of 5 km each."""
    values: int | None = 64
    """Principal components of the values that are kept; None: all."""

    def trained(self, **changes: Any) -> "Point":
        """The same with other training parameters."""
        return replace(self, train=self.train.model_copy(update=changes))

    def seen(self, name: str, dim: int = 1024) -> "Point":
        """The same with another image encoder."""
        return self.trained(encoder=EncoderParams(name=name, dim=dim))

    def key(self, *without: str) -> str:
        """A name of what was configured, apart from some fields."""
        fields = asdict(self) | {"train": self.train.model_dump(exclude_defaults=False)}
        text = json.dumps({name: value for name, value in fields.items() if name not in without}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


BASE = Point()


def satclip(steps: int) -> TrainParams:
    """SatCLIP's own recipe for a smaller training: as many pairs in a batch and views of each as by default here."""
    return TrainParams(preset="satclip").model_copy(update={"steps": steps, "batch": 1024, "views": 1})


def questions() -> dict[str, dict[str, Point]]:
    """What is asked: per question the configurations, one factor at a time around the defaults."""
    t, m = BASE.trained, lambda **changes: replace(BASE, method=Method(**changes))
    plus = "range+"
    return {
        "seed": {str(n): t(seed=n) for n in SEEDS},
        "degree": {f"L = {n}": t(degree=n) for n in (10, 20, 30, 40)},
        "smoothness": {f"{s:g}": t(smoothness=s) for s in (0, 1, 2, 3)},
        "hidden": {str(n): t(hidden=n) for n in (256, 512, 1024)},
        "dim": {str(n): t(dim=n) for n in (128, 256, 512)},
        "members": {str(n): t(members=n) for n in (1, 3, 5)},
        "location encoder": {name: t(location=name) for name in ("harmonics", "tessellation")},
        "SatCLIP's recipe": {
            "ours": BASE,
            **{f"SatCLIP's, {n} steps": replace(BASE, train=satclip(n)) for n in (150, 1500)},
        },
        "steps": {str(n): t(steps=n) for n in (75, 150, 300, 600)},
        "batch": {str(n): t(batch=n) for n in (256, 1024, 4096)},
        "learning rate": {f"{r:g}": t(lr=r) for r in (3e-4, 1e-3, 3e-3)},
        "weight decay": {f"{w:g}": t(weight_decay=w) for w in (0, 0.01, 0.3)},
        "dropout": {f"{p:g}": t(dropout=p) for p in (0, 0.2)},
        "mask": {f"{km} km": t(mask_km=km) for km in (0, 150, 300)},
        "views": {str(n): t(views=n) for n in (1, 4, 8)},
        "patch": {f"{n} pixels": replace(BASE, pixels=n) for n in (16, 32, 48)},
        "images": {f"{n:,}": replace(BASE, images=n) for n in (2500, 5000, 10_000, 20_000, 40_000)},
        "image encoder": {
            "colours": BASE.seen("colours", 24),
            **{f"rcf {n}": BASE.seen("rcf", n) for n in (256, 1024, 2048)},
            "rcf, fine": BASE.seen("fine"),
            "rcf, coarse": BASE.seen("coarse"),
        },
        "values": {
            "64": replace(BASE, values=64),
            "256": replace(BASE, values=256),
            "all 1024": replace(BASE, values=None),
        },
        "temperature": {f"{s:g}": m(name=plus, beta=1, temperature=s) for s in (4, 8, 12, 20, 40, 80)},
        "geodesic temperature": {f"{g:g}": m(name=plus, geodesic_temperature=g) for g in (10, 40, 100, 400, 2000)},
        "beta": {f"{b:g}": m(name=plus, beta=b) for b in (0, 0.25, 0.5, 0.75, 1)},
        "method": {name: m(name=name) for name in ("none", "top1", "topk", "range", plus)},
    }


@dataclass(frozen=True)
class Task:
    """A probe."""

    name: str
    kind: Kind
    lonlat: NDArray[np.float64]
    """(n, 2) degrees."""
    labels: NDArray
    """(n,)."""
    block_degrees: float = 10.0
    """Side of the blocks that are held out."""

    def scores(self, features: NDArray[np.float32]) -> tuple[float, float]:
        """On one random split, and the mean on the blocked ones: of its own, so that what was kept still counts."""
        rows, blocks = np.arange(len(self.labels)), block_of(self.lonlat, self.block_degrees)
        splits = [Split(*train_test_split(rows, test_size=0.2, random_state=SEED))]
        for seed in range(SEED, SEED + BLOCKS):
            splitter = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
            splits.append(Split(*next(splitter.split(rows, groups=blocks))))
        first, *rest = (score(features, self.labels, self.kind, split) for split in splits)
        return first, float(np.mean(rest))


@lru_cache
def tasks(points: int = POINTS) -> tuple[Task, ...]:
    """The demo's labels, and the real ones where they are."""
    made = [Task(s.name, s.kind, s.lonlat, s.labels) for s in demo_labels(2500, seed=LABEL_SEED)]
    folder = Path(os.environ.get("RANGEGRID_FIXTURES", "../shared/data")) / "labels"
    if folder.is_dir():
        made += [
            _table(folder / "temperature_stations.csv", "station temperature", ("Lon", "Lat", "meanT"), points),
            _table(folder / "mosaiks_elevation.csv.gz", "MOSAIKS elevation", ("lon", "lat", "elevation"), points),
            _table(
                folder / "california_housing.csv",
                LOCAL,
                ("longitude", "latitude", "median_house_value"),
                points,
                block_degrees=1.0,
            ),
        ]
    return tuple(made)


def _table(path: Path, name: str, columns: tuple[str, str, str], points: int, block_degrees: float = 10.0) -> Task:
    rows = pd.read_csv(path)[list(columns)].dropna()
    rows = rows.sample(min(points, len(rows)), random_state=0)
    lonlat, labels = rows[list(columns[:2])].to_numpy("f8"), rows[columns[2]].to_numpy("f8")
    return Task(name, "regression", lonlat, labels, block_degrees)


@dataclass(frozen=True)
class Colours:
    """The plainest image encoder: mean, spread and quantiles of each band."""

    dim: int

    def encode(self, images: Images) -> NDArray[np.float32]:
        """(n, band, y, x) to (n, 6 * bands)."""
        pixels = images.reshape(*images.shape[:2], -1)
        quantiles = np.quantile(pixels, (0.1, 0.5, 0.9, 0.99), axis=-1)
        return np.concatenate([pixels.mean(-1), pixels.std(-1), *quantiles], axis=1).astype(np.float32)


def fit_colours(sample: Images, bands: tuple[str, ...], dim: int, seed: int) -> Colours:
    """There is nothing to fit."""
    return Colours(6 * len(bands))


FITS: dict[str, Callable[..., Any]] = {
    "rcf": fit_rcf,
    "fine": partial(fit_rcf, scales=(Scale(1, 3, 1),)),
    "coarse": partial(fit_rcf, scales=(Scale(2, 3, 0.4), Scale(4, 3, 0.6))),
    "colours": fit_colours,
}


class Study:
    """The patches, and everything that was computed from them."""

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        row_ids = patches.manifest["row_id"].to_numpy()
        self.order = np.argsort(row_ids, kind="stable")  # n images are the first n that were drawn
        self.lonlat = patches.manifest[["lon", "lat"]].to_numpy("f8")[self.order]

    def scores(self, point: Point, points: int = POINTS) -> dict[str, tuple[float, float]]:
        """Scores by task: random split, blocked splits."""
        return kept_scores(f"{point.key()}-{points}", partial(self.embed, point), points)

    def embed(self, point: Point, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Embeddings of places, (m, v + d)."""
        location, keys = self.model(point)
        queries = location.embed(lonlat)
        if point.method.name == "none":
            return queries
        values = self.features(point)[0]
        if point.values and point.values < values.shape[1]:
            values = Projection.fit(values, point.values).apply(values)
        index = RetrievalIndex(keys, values, self.lonlat[: point.images], queries=len(queries))
        return np.concatenate([index.retrieve(queries, lonlat, point.method), queries], axis=1)

    def model(self, point: Point) -> tuple[PlaceEncoder, NDArray[np.float32]]:
        """A trained location encoder, and the keys of the images."""
        kept = HOME / f"model-{point.key('method', 'values')}.pt"
        if not kept.exists():
            torch.save(self._train(point), kept)
        saved = torch.load(kept, weights_only=True)
        location = rebuild(saved["architecture"])
        location.load_state_dict(saved["weights"])
        return location, saved["keys"].numpy()

    def _train(self, point: Point) -> dict[str, Any]:
        features, lonlat = self.features(point), self.lonlat[: point.images]
        held_out = hold_out(lonlat, BLOCK_DEGREES, point.train.held_out_share, point.train.seed)
        pairs = Pairs(lonlat, FeatureArray(features), held_out)
        members = [self._member(pairs, seeded(point.train, number)) for number in range(point.train.members)]
        location, projection = together(members)
        keys = torch.from_numpy(projection.keys(features[0]))
        return {"architecture": location.architecture, "weights": location.state_dict(), "keys": keys}

    def _member(self, pairs: Pairs, params: TrainParams) -> Trainer:
        trainer = new_trainer(pairs, params)
        for _ in train(trainer, pairs, every=params.steps):
            pass
        return trainer

    def features(self, point: Point) -> NDArray[np.float32]:
        """Features of the first images, (view, image, feature)."""
        return np.stack([self._features(point, view) for view in range(point.train.views)])

    def _features(self, point: Point, view: int) -> NDArray[np.float32]:
        params = point.train.encoder
        name = f"features-{params.name}-{params.dim}-{params.seed}-{point.images}-{point.pixels}-{view}.npy"
        if not (HOME / name).exists():
            encoder = self._fit(params, point.pixels)
            wanted = np.sort(self.order[: point.images])
            found = [encoder.encode(view_of(part, view)) for part in self._images(wanted, point.pixels)]
            np.save(HOME / name, np.concatenate(found)[np.searchsorted(wanted, self.order[: point.images])])
        return np.load(HOME / name)

    def _fit(self, params: EncoderParams, pixels: int) -> Any:
        starts = np.linspace(0, len(self.order) - RUN, RUNS).astype(int)  # as the train step does
        sample = np.concatenate(list(self._images((starts[:, None] + np.arange(RUN)).ravel(), pixels)))
        return FITS[params.name](sample, self.patches.bands, params.dim, params.seed)

    def _images(self, rows: NDArray[np.int64], pixels: int) -> Iterator[Images]:
        """Reflectance of the middle of the patches of ascending rows, shard by shard."""
        edge = (SAMPLE.patch_pixels - pixels) // 2
        inner = slice(edge, edge + pixels)
        for start in range(0, len(self.order), SAMPLE.shard_patches):
            mine = rows[(rows >= start) & (rows < start + SAMPLE.shard_patches)] - start
            shard = self.patches.reflectance(slice(start, min(start + SAMPLE.shard_patches, len(self.order))))
            yield np.ascontiguousarray(shard[mine][..., inner, inner])


def kept_scores(name: str, embed: Embed, points: int) -> dict[str, tuple[float, float]]:
    """Scores of an embedder by task, computed once."""
    kept = HOME / "scores" / f"labels-{LABEL_SEED}" / f"{name}.json"
    if not kept.exists():
        probed = tasks(points)
        parts = np.split(embed(np.concatenate([task.lonlat for task in probed])), _edges(probed))
        found = {task.name: task.scores(part) for task, part in zip(probed, parts, strict=True)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def _edges(probed: tuple[Task, ...]) -> NDArray[np.int64]:
    return np.cumsum([len(task.labels) for task in probed])[:-1]


def main() -> None:
    """Answers the questions that are named, or all."""
    asked = sys.argv[1:] or [*questions(), COMPARISON]
    HOME.mkdir(parents=True, exist_ok=True)
    with sandbox.running(SANDBOX, prefect=False) as box:
        os.environ.update(box.environment())
        with clusters.connect() as client:
            study = Study(open_patches(sample_patches(client, SAMPLE)))
        print(machine(), flush=True)
        answers = {}
        for name in asked:
            print(f"\n### {name}\n", flush=True)
            if name == COMPARISON:
                compare(study)
            else:
                answers[name] = answer(study, questions()[name])
    if len(answers) == len(questions()):
        CHART.write_bytes(chart(answers))


def machine() -> str:
    """What this runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def answer(study: Study, points: dict[str, Point]) -> Answer:
    """Prints what each configuration reaches, and returns it: of the location encoder alone, and with retrieval."""
    print("| | location encoder | with retrieval | housing, with retrieval |\n|---|---|---|---|", flush=True)
    found = {}
    for label, point in points.items():
        alone, with_images = study.scores(replace(point, method=Method("none"))), study.scores(point)
        found[label] = _mean(alone), _mean(with_images)
        cells = [*found[label], with_images.get(LOCAL, NOT_THERE)]
        print(f"| {label} | " + " | ".join("{:.3f} / {:.3f}".format(*cell) for cell in cells) + " |", flush=True)
    return found


def _mean(scores: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Of the global tasks: random split, blocked splits."""
    random, blocked = np.mean([pair for task, pair in scores.items() if task != LOCAL], axis=0)
    return float(random), float(blocked)


def chart(answers: dict[str, Answer]) -> bytes:
    """A panel per question: blocked means of the location encoder alone and with retrieval."""
    columns = 5
    rows = -(-len(answers) // columns)
    figure = Figure(figsize=(13, 2.5 * rows), facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, (name, found) in zip(panels, answers.items(), strict=False):
        for half, colour in enumerate(("#9db7c4", SECOND)):
            axes.plot(list(found), [pair[half][1] for pair in found.values()], "o-", color=colour, ms=5)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_ylim(*SHOWN)
        axes.tick_params(axis="x", labelsize=8, rotation=20 if max(map(len, found)) > 6 else 0)
        axes.grid(axis="y", color="#e3e8ec", lw=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(answers) :]:
        axes.set_axis_off()
    figure.suptitle(
        "Mean score of the global tasks, blocks held out: location encoder (pale) and with retrieval (full)",
        x=0.01,
        ha="left",
        color=INK,
        fontsize=13,
    )
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def compare(study: Study) -> None:
    """Prints and draws the scores by task beside GeoCLIP's, mean and spread over seeds of what was trained."""
    found: dict[str, list[dict[str, tuple[float, float]]]] = {
        "coordinates": [kept_scores("coordinates", lambda lonlat: lonlat.astype(np.float32), MANY)],
        "GeoCLIP": [kept_scores("geoclip", embed_geoclip, MANY)],
    }
    for name, method in {"location encoder": Method("none"), "RANGE": Method("range"), "RANGE+": Method()}.items():
        point = replace(BASE, method=method, values=None)
        found[name] = [study.scores(point.trained(seed=seed), MANY) for seed in SEEDS]
    names = [task.name for task in tasks(MANY)]
    print("| random / blocked | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, runs in found.items():
        print(f"| {name} | " + " | ".join(_cell([run[task] for run in runs]) for task in names) + " |", flush=True)
    PICTURE.write_bytes(score_chart(_long(found), "Beside GeoCLIP, from Blue Marble alone", CAPTION))


def _cell(runs: list[tuple[float, float]]) -> str:
    means = np.mean(runs, axis=0)
    if len(runs) == 1:
        return "{:.3f} / {:.3f}".format(*means)
    spreads = np.std(runs, axis=0, ddof=1)
    return " / ".join(f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(means, spreads, strict=True))


def _long(found: dict[str, list[dict[str, tuple[float, float]]]]) -> pd.DataFrame:
    rows = []
    for name, runs in found.items():
        for task in tasks(MANY):
            random, blocked = np.mean([run[task.name] for run in runs], axis=0)
            metric = "accuracy" if task.kind == "classification" else "R²"
            rows.append((task.name, metric, name, random, blocked))
    return pd.DataFrame(rows, columns=["task", "metric", "embedder", "random", "blocked"])


if __name__ == "__main__":
    main()
