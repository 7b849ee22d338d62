"""A storage with the patches that encoders are trained on."""

import pytest

from tests.tasks.test_train import mock_patches


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """URL of a folder that is the storage, with patches."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        mock_patches(f"{folder.as_uri()}/patches/p")
        yield folder.as_uri()
