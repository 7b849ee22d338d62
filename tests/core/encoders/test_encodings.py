"""Encodings without weights, against rangegeo's."""

import numpy as np
import torch
from rangegeo.satclip.positional_encoding.cartesian3d import Cartesian3D
from rangegeo.satclip.positional_encoding.theory import Theory
from rangegeo.satclip.positional_encoding.wrap import Wrap

from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.encodings import theory, wrap

PLACES = np.random.default_rng(0).uniform([-180, -90], [180, 90], (40, 2))


def published(encoding):
    return encoding(torch.from_numpy(PLACES)).numpy()


def test_encodings_are_the_published_ones():
    np.testing.assert_allclose(wrap(PLACES), published(Wrap()), atol=1e-12)
    np.testing.assert_allclose(theory(PLACES), published(Theory(frequency_num=32, min_radius=1)), atol=1e-9)
    np.testing.assert_allclose(unit_vectors(PLACES), published(Cartesian3D()), atol=1e-12)
