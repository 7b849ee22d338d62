"""The geographic prior on photographs whose classes live apart."""

import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import MinMaxScaler

from infra.errors import UserError
from tasks.core.many_classes import fit_many
from tasks.evaluation.embedders import Named
from tasks.evaluation.geoprior import geo_prior, log_prior, read_photographs


@pytest.fixture
def photographs(tmp_path):
    """Two pairs of species: the image tells the pairs apart, the place tells the two of a pair."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    lonlat = np.column_stack([np.where(labels % 2, 60, -60) + rng.normal(0, 8, 600), rng.uniform(-50, 50, 600)])
    train = rng.random(600) < 0.7
    images = np.log(np.where(labels[:, None] // 2 == np.arange(4) // 2, 0.45, 0.05)) + rng.normal(0, 0.01, (600, 4))
    np.savez(tmp_path / "inat.npz", lonlat=lonlat, labels=labels, train=train, log_probs=images[~train])
    with read_photographs(str(tmp_path / "inat.npz")) as found:
        yield found


COORDINATES = Named("coordinates", lambda lonlat: lonlat.astype(np.float32))


def test_places_tell_what_images_cannot(photographs):
    table = geo_prior(photographs, [COORDINATES, Named("SINR", None)]).set_index("embedder")
    assert table.loc["image alone", "top-1"] == pytest.approx(0.5, abs=0.08)
    assert table.loc["coordinates", "top-1"] > 0.97
    assert table.loc["image alone", "top-3"] <= table.loc["image alone", "top-5"] == 1.0
    assert table.loc["SINR", "note"] == "weights not given"


def test_the_prior_is_a_probability_and_unseen_classes_keep_little(photographs):
    blocks = log_prior(photographs, COORDINATES.embed(photographs.lonlat))
    prior = np.exp(np.concatenate([found for _, found in blocks]))
    assert ((prior > 0) & (prior <= 1)).all()
    told = photographs.labels[~photographs.train]
    east = told % 2 == 1
    assert prior[east][:, [1, 3]].mean() > 4 * prior[east][:, [0, 2]].mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(600, 9)}, "not columns 0 to 3"),
        ({"log_probs": np.zeros((3, 4))}, "log_probs of 3"),
        ({"lonlat": np.full((600, 2), np.nan)}, "not numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(photographs, tmp_path, change, message):
    given = {name: array for name, array in vars(photographs).items() if array is not None}
    np.savez(tmp_path / "bad.npz", **given | change)
    refused(tmp_path / "bad.npz", message)


def refused(path, message):
    with pytest.raises(UserError, match=message), read_photographs(str(path)):
        pass


def test_a_file_of_something_else_is_refused(photographs, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    refused(tmp_path / "bad.npz", r"is no \.npz with lonlat")
    np.savez_compressed(tmp_path / "bomb.npz", lonlat=np.zeros((10**6, 2)))
    refused(tmp_path / "bomb.npz", "would expand to 16,000")
    refused(tmp_path / "gone.npz", "there is no file")
    given = {name: getattr(photographs, name) for name in ("lonlat", "labels", "train")}
    np.savez(tmp_path / "places.npz", **given)
    refused(tmp_path / "places.npz", "neither log_probs nor features")
    np.savez(tmp_path / "evil.npz", **given, features=np.array([print]))
    refused(tmp_path / "evil.npz", r"is no \.npz with lonlat")


def test_image_features_and_embedding_are_one_probe_as_in_the_papers_code(tmp_path):
    """Against its lines: concatenate, MinMaxScaler, RidgeClassifierCV with 5 folds, top-k of the decision function."""
    rng = np.random.default_rng(3)
    labels = np.concatenate([np.repeat(np.arange(12), 30), [12, 12]])  # one class is in one fold alone
    rng.shuffle(labels)
    n = len(labels)
    train = rng.random(n) < 0.75
    train[labels == 12] = True
    lonlat = np.column_stack([labels * 20 - 120 + rng.normal(0, 25, n), rng.uniform(-60, 60, n)])
    features = (np.eye(13)[labels] @ rng.normal(size=(13, 6)) + rng.normal(0, 1.5, (n, 6))).astype("f4")
    np.savez(tmp_path / "p.npz", lonlat=lonlat, labels=labels, train=train, features=features)
    both = np.concatenate([lonlat.astype("f4"), features], axis=1).astype("f8")
    scaler = MinMaxScaler().fit(both[train])
    theirs = RidgeClassifierCV(alphas=(0.1, 1.0, 10.0), cv=5).fit(scaler.transform(both[train]), labels[train])
    said = theirs.decision_function(scaler.transform(both[~train]))
    with read_photographs(str(tmp_path / "p.npz")) as found:
        table = geo_prior(found, [COORDINATES]).set_index("embedder")
        ours = fit_many(lambda rows: both[train][rows], labels[train], 5)
    assert list(table.index) == ["image features", "coordinates and image features"]
    np.testing.assert_allclose(ours.decide(both[~train]), said, atol=1e-9)
    assert ours.alpha == theirs.alpha_
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels[~train], said, k=k, labels=np.arange(13))
        assert table.loc["coordinates and image features", f"top-{k}"] == pytest.approx(expected, abs=5e-5)
    assert table["top-1"].is_monotonic_increasing  # places tell something


def test_memory_grows_with_classes_but_not_with_photographs_times_classes(tmp_path):
    """Targets of these photographs alone would be 160 MB, of the paper's 28 GB; both ways stay far below, by blocks."""
    rng = np.random.default_rng(0)
    n, classes = 20_000, 1_000
    labels = np.arange(n) % classes
    arrays = {"lonlat": rng.uniform(-90, 90, (n, 2)), "labels": labels, "train": np.arange(n) < n - 1000}
    log_probs = np.zeros((1000, classes), "f4")
    np.savez(tmp_path / "p.npz", **arrays, features=rng.random((n, 4), "f4"), log_probs=log_probs)
    tracemalloc.start()
    with read_photographs(str(tmp_path / "p.npz")) as found:
        geo_prior(found, [COORDINATES])
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * n * classes * 8
