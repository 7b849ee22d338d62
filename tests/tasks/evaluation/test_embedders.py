"""Embedders by name: other projects' networks against plain torch modules, grids against xarray."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from infra.errors import UserError
from tasks.core.encoders.location import LocationEncoder
from tasks.evaluation.embedders import NAMES, embedders, load_csp, load_satclip, load_sinr
from tasks.model.checkpoint import save_checkpoint
from tasks.model.satclip import export_satclip
from tasks.params import EvaluateParams

PLACES = np.random.default_rng(0).uniform([-180, -90], [180, 90], (50, 2))


class Residual(nn.Module):
    """Two layers and a shortcut."""

    def __init__(self, size):
        super().__init__()
        self.w1, self.w2 = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return x + torch.relu(self.w2(torch.relu(self.w1(x))))


@pytest.fixture
def sinr():
    """A network laid out as SINR's."""
    torch.manual_seed(0)
    return nn.ModuleDict({"feats": nn.Sequential(nn.Linear(4, 12), nn.ReLU(), *(Residual(12) for _ in range(4)))})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_sinr_is_its_network(sinr, tmp_path, suffix):
    path = str(tmp_path / f"sinr{suffix}")
    if suffix == ".pt":
        torch.save({"state_dict": sinr.state_dict(), "params": {"input_enc": "sin_cos"}}, path)
    else:
        save_file(sinr.state_dict(), path)
    scaled = torch.from_numpy(PLACES / [180, 90]).float() * math.pi
    with torch.no_grad():
        expected = sinr["feats"](torch.cat([scaled.sin(), scaled.cos()], 1))
    np.testing.assert_allclose(load_sinr(path)(PLACES), expected, atol=1e-5)


def test_a_sinr_of_climate_is_refused(tmp_path):
    torch.save({"feats.0.weight": torch.zeros(3, 24), "feats.0.bias": torch.zeros(3)}, tmp_path / "env.pt")
    with pytest.raises(UserError, match="has 24 inputs, environmental ones too"):
        load_sinr(str(tmp_path / "env.pt"))


class Layer(nn.Module):
    """A layer of CSP's network."""

    def __init__(self, inputs, outputs, last):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.layernorm = None if last else nn.LayerNorm(outputs)
        self.skip = not last and inputs == outputs

    def forward(self, x):
        y = nn.functional.leaky_relu(self.linear(x), 0.2)
        y = y + x if self.skip else y
        return y if self.layernorm is None else self.layernorm(y)


def test_csp_is_its_network(tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(Layer(16, 10, False), Layer(10, 10, False), Layer(10, 6, True))
    settings = {
        "spa_enc_type": "gridcell", "frequency_num": 4, "min_radius": 0.1, "max_radius": 360, "freq_init": "geometric",
        "spa_f_act": "leakyrelu", "skip_connection": True, "use_layn": True,
    }  # fmt: skip
    state = {f"loc_enc.spa_enc.ffn.layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    torch.save(
        {"params": settings, "state_dict": state | {"class_emb.weight": torch.zeros(2, 6)}}, tmp_path / "csp.tar"
    )
    angles = []
    for lon, lat in PLACES:
        row = []
        for value in (lon, lat):
            for i in range(4):
                wavelength = 0.1 * (360 / 0.1) ** (i / 3)
                row += [math.sin(value / wavelength), math.cos(value / wavelength)]
        angles.append(row)
    with torch.no_grad():
        expected = layers(torch.tensor(angles))
    np.testing.assert_allclose(load_csp(str(tmp_path / "csp.tar"))(PLACES), expected, atol=1e-4)


def test_satclip_is_its_network(tmp_path):
    location = LocationEncoder(6, hidden=16, dim=8)
    save_checkpoint((tmp_path / "checkpoint").as_uri(), location)
    export_satclip((tmp_path / "checkpoint").as_uri(), tmp_path / "satclip.ckpt")
    found = load_satclip(str(tmp_path / "satclip.ckpt"))(PLACES)
    np.testing.assert_allclose(found, location(PLACES).detach(), atol=1e-5)


@pytest.mark.parametrize("name", ["sinr", "csp", "satclip"])
def test_a_file_that_is_no_such_model_is_one_sentence(tmp_path, name):
    torch.save({"state_dict": {"other": torch.zeros(2)}}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"wrong\.pt"):
        embedders(None, None, None, EvaluateParams(embedder=(f"{name}={tmp_path / 'wrong.pt'}",)))


def test_those_without_weights_stay_in_the_list():
    found = {one.name: one.embed for one in embedders(None, None, None, EvaluateParams())}
    assert [name for name, embed in found.items() if embed is None] == ["SatCLIP", "SINR", "CSP"]
    assert len(found) == len(NAMES) - 5  # ours need a checkpoint
    for name, embed in found.items():
        assert embed is None or embed(PLACES).shape[0] == 50, name


@pytest.mark.parametrize(
    ("embedder", "message"),
    [
        ("satellite", "is unknown: use coordinates"),
        ("range+", "name the checkpoint"),
        ("gone.zarr", "there is nothing at"),
    ],
)
def test_what_cannot_be_had_is_refused(embedder, message):
    with pytest.raises(UserError, match=message):
        embedders(None, None, None, EvaluateParams(embedder=(embedder,)))
