"""Encoders by name: what each takes, does to the numbers, and refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import UserError
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders import vision
from tasks.core.encoders.images import take_bands
from tasks.core.encoders.location import LocationEncoder
from tasks.core.encoders.registry import TOWERS, TorchEncoder, fit_encoder, load_encoder, load_tower, middle
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tests.core.encoders import my_encoder

L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
RNG = np.random.default_rng(0)


def weights(name):
    torch.manual_seed(0)
    network = TOWERS[name].network(len(TOWERS[name].channels))
    return {key: value.numpy() for key, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def resnet():
    return load_tower("satclip-resnet18", weights("satclip-resnet18"))


def test_satclip_sees_reflectance_with_zeros_for_b10(resnet):
    images = RNG.uniform(0, 1, (3, 12, 224, 224)).astype("f4")
    thirteen = np.insert(images, 10, 0.0, axis=1)  # as in SatCLIP: after B09, before B11
    network = vision.resnet18(13).eval()
    network.load_state_dict(resnet.module.state_dict())
    with torch.no_grad():
        expected = network(torch.from_numpy(thirteen)).numpy()
    assert resnet.bands == L2A
    np.testing.assert_allclose(resnet.encode(images), expected, rtol=1e-4, atol=1e-5)


def test_an_image_alone_gives_what_it_gives_among_others(resnet):
    images = RNG.uniform(0, 1, (18, 12, 32, 32)).astype("f4")
    np.testing.assert_allclose(resnet.encode(images)[-1:], resnet.encode(images[-1:]), rtol=1e-3, atol=1e-5)
    assert resnet.encode(images[:0]).shape == (0, 512)


def test_nodata_takes_the_mean_of_its_image_and_band(resnet):
    image = RNG.uniform(0, 1, (1, 12, 224, 224)).astype("f4")
    image[0, 3, :40] = np.nan
    image[0, 5] = np.nan
    filled = image.copy()
    filled[0, 3, :40] = np.nanmean(image[0, 3])
    filled[0, 5] = 0
    np.testing.assert_allclose(resnet.encode(image), resnet.encode(filled), rtol=1e-3, atol=1e-5)


class Echo(torch.nn.Module):
    """Hands back what it is given, so that the preparation can be seen."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1)


def test_satmae_sees_the_true_colour_image_as_imagenet_normalised_rgb():
    """As RANGE's database was built: 8-bit RGB that is white at reflectance 0.2, its middle 224 pixels."""
    tower = TOWERS["satmae"]
    echo = TorchEncoder("echo", Echo(), tower.channels, 3 * 224**2, tower.mean, tower.std, tower.brightest)
    image = RNG.uniform(0, 0.4, (1, 12, 256, 256)).astype("f4")
    rgb = take_bands(image, L2A, echo.bands)
    white = np.minimum(image[0, [3, 2, 1], 16:240, 16:240].astype("f8") / 0.2, 1)
    expected = (white - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    np.testing.assert_allclose(echo.encode(rgb)[0], expected.ravel(), atol=1e-5)


def test_satmae_of_sentinel2_sees_the_levels_of_its_training():
    """As SatMAE's SentinelNormalize, a byte of two deviations about each band's mean, of the middle 96 pixels."""
    tower = TOWERS["satmae-sentinel2"]
    how = (tower.mean, tower.std, tower.brightest, tower.levels, tower.size)
    echo = TorchEncoder("echo", Echo(), tower.channels, 10 * 96**2, *how)
    assert echo.bands == ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    image = RNG.uniform(0, 0.6, (1, 10, 100, 100)).astype("f4")
    numbers = image[0, :, 2:98, 2:98].astype("f8") * 10_000
    low, high = (1184.3824625 - 2 * 650.2842772, 1184.3824625 + 2 * 650.2842772)  # B02
    expected = np.clip((numbers[0] - low) / (high - low) * 255.0, 0, 255).astype("u1") / 255
    found = echo.encode(image)[0].reshape(10, 96, 96)
    assert np.mean(np.abs(found[0] - expected) < 1e-6) > 0.9999  # a number at the edge of a level may round either way
    last = np.clip((numbers[9] - 1247.9187 + 2 * 1087.6021) / (4 * 1087.6021), 0, 1)  # B12
    assert np.abs(found[9] - last).max() < 1.01 / 255


def test_the_middle_is_cropped_and_small_images_are_enlarged():
    image = torch.arange(30.0 * 21).reshape(1, 1, 30, 21)
    assert torch.equal(middle(image, 11), image[:, :, 10:21, 5:16])
    assert middle(image, 224).shape == (1, 1, 224, 224)
    ramp = torch.linspace(0, 1, 64)[None, None, None].expand(1, 1, 64, 64)
    large = middle(ramp, 224)[0, 0, 100]
    np.testing.assert_allclose(large[10:-10], (torch.arange(224) + 0.5)[10:-10] / 224 * 64 / 63 - 0.5 / 63, atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_what_towers_state_is_true(name):
    tower = TOWERS[name]
    with torch.device("meta"):
        last = [value for value in tower.network(len(tower.channels)).state_dict().values() if value.ndim][-1]
    assert last.shape == (tower.dim,)
    assert set(tower.channels) - {"B10"} <= set(L2A)


def test_arrays_restore_the_encoder(resnet):
    restored = load_encoder("satclip-resnet18", resnet.arrays(), resnet.bands)
    images = RNG.uniform(0, 1, (2, 12, 40, 40)).astype("f4")
    np.testing.assert_array_equal(restored.encode(images), resnet.encode(images))


def broken(**changes):
    return {key: value for key, value in (weights("satclip-resnet18") | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(**{"bn1.bias": None}), "lack bn1.bias"),
        (broken(**{"conv1.weight": np.zeros((64, 3, 7, 7), "f4")}), r"has shape \(64, 3, 7, 7\), not \(64, 13"),
        (broken(**{"bn1.bias": np.full(64, np.nan, "f4")}), "not finite"),
    ],
)
def test_wrong_weights_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        load_tower("satclip-resnet18", arrays)


def test_other_weights_among_them_are_left_out():
    extra = {"decoder_pred.bias": np.zeros(3, "f4")}
    arrays = {key: value for key, value in broken(**extra).items() if not key.endswith("tracked")}
    assert "decoder_pred.bias" not in load_tower("satclip-resnet18", arrays).arrays()


def test_bands_are_taken_by_name():
    images = np.arange(3.0)[None, :, None, None] * np.ones((1, 3, 2, 2))
    np.testing.assert_array_equal(take_bands(images, ("a", "b", "c"), ("c", "a"))[0, :, 0, 0], [2, 0])
    with pytest.raises(ValueError, match="sample patches with d"):
        take_bands(images, ("a", "b", "c"), ("c", "d"))


def test_a_module_of_the_users_own():
    arrays = {"2.weight": np.array([[1, 0], [0, 3]], "f4")}
    encoder = load_encoder("tests.core.encoders.my_encoder:build", arrays, ("B02", "B04"))
    image = np.stack([np.full((8, 8), 0.25), np.full((8, 8), 0.5)])[None].astype("f4")  # B02, B04
    np.testing.assert_allclose(encoder.encode(take_bands(image, ("B02", "B04"), encoder.bands)), [[0.5, 0.75]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "use one of rcf, satclip-resnet18"),
        ("no.such.module:build", "was not found"),
        ("tests.core.encoders.my_encoder:nothing", "was not found"),
        ("tests.core.encoders.my_encoder:unmarked", "does not say that it builds"),
        ("os:system", "does not say that it builds"),
        ("tests.core.encoders.my_encoder:misnamed", "calls itself"),
    ],
)
def test_what_is_no_encoder_is_refused_and_not_called(name, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name, {"2.weight": np.eye(2, dtype="f4")}, ("red", "nir"))


MINE = """
import sys
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shady:build", "does not say that it builds"),
        ("shady:nothing", "was not found"),
        ("room.shady:build", "does not say that it builds"),
        ("room:build", "was not found"),
    ],
)
def test_a_module_is_not_imported_before_its_mark_was_seen(tmp_path, monkeypatch, name, message):
    """By the door that a foreign checkpoint has: its card."""
    (tmp_path / "room").mkdir()
    for module in ("shady", "room/__init__", "room/shady"):
        text = MINE if module.endswith("__init__") else f"{MINE}\ndef build(arrays, bands):\n    raise SystemExit\n"
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = fit_encoder("rcf", np.random.default_rng(0).random((9, 2, 16, 16), "f4"), ("B02", "B04"), 8, 0)
    url = (tmp_path / "checkpoint").as_uri()
    save_checkpoint(url, LocationEncoder(4, hidden=8, dim=4), ImageProjection(encoder.dim, 4), encoder)
    card = tmp_path / "checkpoint" / "card.json"
    card.write_text(card.read_text().replace('"rcf"', f'"{name}"'))
    with pytest.raises(UserError, match=message):
        load_checkpoint(url)
    assert not list(tmp_path.rglob("*.ran"))


@pytest.mark.parametrize("package", ["marked_encoders", "marked.within.others"])
def test_a_marked_module_of_a_package_is_imported(tmp_path, monkeypatch, package):
    (folder := tmp_path.joinpath(*package.split("."))).mkdir(parents=True)
    for above in (folder, *folder.parents[: package.count(".")]):
        (above / "__init__.py").write_text("")
    source = Path(my_encoder.__file__).read_text().replace("tests.core.encoders.my_encoder", f"{package}.mean")
    (folder / "mean.py").write_text(source)
    (folder / "broken.py").write_text("def build(:")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load_encoder(f"{package}.mean:build", {"2.weight": np.eye(2, dtype="f4")}, ("B02", "B04"))
    assert encoder.dim == 2
    with pytest.raises(ValueError, match="is in no Python source"):
        load_encoder(f"{package}.broken:build", {}, ("B02", "B04"))
    (tmp_path / "bare" / "within").mkdir(parents=True)
    with pytest.raises(ValueError, match="without __init__"):
        load_encoder("bare.within.no:build", {}, ("B02", "B04"))


@pytest.mark.parametrize("name", ["rcf", "tests.core.encoders.my_encoder:build"])
def test_weights_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match="cannot be built of these weights"):
        load_encoder(name, {"other": np.eye(2, dtype="f4")}, ("red", "nir"))


def test_a_tower_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"needs weights.*safetensors"):
        fit_encoder("satmae", np.zeros((1, 3, 8, 8), "f4"), ("B04", "B03", "B02"), 1024, 0)
