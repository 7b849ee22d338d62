"""The geographic prior on photographs whose classes live apart."""

import numpy as np
import pytest

from infra.errors import UserError
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
    return read_photographs(str(tmp_path / "inat.npz"))


COORDINATES = Named("coordinates", lambda lonlat: lonlat.astype(np.float32))


def test_places_tell_what_images_cannot(photographs):
    table = geo_prior(photographs, [COORDINATES, Named("SINR", None)]).set_index("embedder")
    assert table.loc["image alone", "top-1"] == pytest.approx(0.5, abs=0.08)
    assert table.loc["coordinates", "top-1"] > 0.97
    assert table.loc["image alone", "top-3"] <= table.loc["image alone", "top-5"] == 1.0
    assert table.loc["SINR", "note"] == "weights not given"


def test_the_prior_is_a_probability_and_unseen_classes_keep_little(photographs):
    prior = np.exp(log_prior(photographs, COORDINATES.embed(photographs.lonlat)))
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
    np.savez(tmp_path / "bad.npz", **vars(photographs) | change)
    with pytest.raises(UserError, match=message):
        read_photographs(str(tmp_path / "bad.npz"))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"is no \.npz with lonlat"):
        read_photographs(str(tmp_path / "bad.npz"))
    np.savez_compressed(tmp_path / "bomb.npz", lonlat=np.zeros((10**6, 2)))
    with pytest.raises(UserError, match="would expand to 16,000"):
        read_photographs(str(tmp_path / "bomb.npz"))
    with pytest.raises(UserError, match="there is no file"):
        read_photographs(str(tmp_path / "gone.npz"))
