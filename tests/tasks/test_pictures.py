"""Pictures against scikit-learn."""

import numpy as np
from sklearn.decomposition import PCA

from tasks.pictures import STRIP, principal_colours


def test_colours_are_ranks_of_the_principal_components():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(6, STRIP + 7, 9)) * np.array([9, 5, 3, 1, 1, 1])[:, None, None]).astype(np.float32)
    vectors[:, rng.random(vectors.shape[1:]) < 0.4] = np.nan
    known = np.isfinite(vectors[0])
    colours = principal_colours(vectors)
    np.testing.assert_array_equal(colours[..., 3], known)
    expected = PCA(3).fit_transform(vectors[:, known].T.astype("f8"))
    for found, component in zip(colours[known, :3].T, expected.T, strict=True):
        agreement = np.corrcoef(found, component.argsort().argsort())[0, 1]
        assert abs(agreement) > 0.9999
