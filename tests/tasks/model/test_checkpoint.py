"""Checkpoints: what is saved is loaded, and exchange with rangegeo to 1e-6."""

import argparse
import json
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from rangegeo import load_satclip_location_encoder

from infra import storage
from infra.errors import UserError
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders import vision
from tasks.core.encoders.location import LocationEncoder
from tasks.core.encoders.rcf import fit_rcf
from tasks.core.encoders.registry import load_tower
from tasks.model.checkpoint import dump_state, keys_of, load_checkpoint, parse_state, save_checkpoint
from tasks.model.satclip import export_satclip, import_satclip

POLES = np.array([[0, 90], [0, -90], [180, 60], [-180, 60]], float)


@pytest.fixture
def home(tmp_path):
    return tmp_path.as_uri()


def places(n=300):
    rng = np.random.default_rng(0)
    scattered = np.c_[rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))]
    return np.concatenate([scattered, POLES])


def random_encoder(degree, **kwargs):
    torch.manual_seed(degree)
    encoder = LocationEncoder(degree, **kwargs)
    for layer in encoder.layers:  # rougher than at the start of training
        layer.weight.data *= 1.5
    return encoder


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def embed_by(encoder, lonlat):
    with torch.no_grad():
        return encoder(lonlat).numpy()


def satclip_file(path, degree, harmonics="analytic", visual=None, **more):
    """A random checkpoint in the layout of microsoft/satclip, not made by our export."""
    generator = torch.Generator().manual_seed(degree)
    shapes = {"layers.0": (512, degree**2), "layers.1": (512, 512), "last_layer": (256, 512)}
    weights = {}
    for name, shape in shapes.items():
        bound = 1.5 / shape[1] if name == "layers.0" else 1.5 * (6 / shape[1]) ** 0.5
        for part, size in (("weight", shape), ("bias", shape[:1])):
            value = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1) * bound
            weights[f"model.location.nnet.{name}.{part}"] = value
    hyper = {
        "le_type": "sphericalharmonics", "pe_type": "siren", "legendre_polys": degree,
        "harmonics_calculation": harmonics, "embed_dim": 256, "capacity": 512, "num_hidden_layers": 2,
        "min_radius": 1, "max_radius": 360, "frequency_num": 16, **more,
    }  # fmt: skip
    torch.save({"hyper_parameters": hyper, "state_dict": weights | (visual or {}), "epoch": 3}, path)
    return path


def random_tower(network, head, dim=256):
    """An image tower with its last layer, random, under the names of the published files."""
    torch.manual_seed(1)
    last = torch.nn.Linear([v for v in network.state_dict().values() if v.ndim][-1].shape[0], dim)
    tower = network.state_dict() | {f"{head}.{name}": value for name, value in last.state_dict().items()}
    return last, {f"model.visual.{name}": value for name, value in tower.items()}


@pytest.mark.parametrize("harmonics", ["analytic", "closed-form"])
@pytest.mark.parametrize("degree", [10, 40])
def test_imported_weights_embed_as_rangegeo(home, tmp_path, degree, harmonics):
    file = satclip_file(tmp_path / "satclip.ckpt", degree, harmonics)
    import_satclip(file, f"{home}/imported")
    ours = load_checkpoint(f"{home}/imported").location
    assert ours.first.weight.dtype == torch.float64
    theirs = load_satclip_location_encoder(file)(torch.from_numpy(places())).detach().numpy()
    assert relative(embed_by(ours, places()), theirs) < 1e-6
    unit = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    assert relative(ours.embed(places()), unit) < 1e-6
    assert relative(ours.float().embed(places()), unit) < 1e-3  # float32, 30 times in a sine


@pytest.mark.parametrize("smoothness", [0.0, 1.0])
@pytest.mark.parametrize("degree", [10, 40])
def test_rangegeo_embeds_our_exported_weights(home, tmp_path, degree, smoothness):
    encoder = random_encoder(degree, smoothness=smoothness)
    save_checkpoint(f"{home}/ours", encoder)
    export_satclip(f"{home}/ours", tmp_path / "out.ckpt")
    theirs = load_satclip_location_encoder(tmp_path / "out.ckpt")(torch.from_numpy(places()))
    assert relative(embed_by(encoder.double(), places()), theirs.detach().numpy()) < 1e-6


def test_export_of_an_import_is_the_same_weights(home, tmp_path):
    file = satclip_file(tmp_path / "satclip.ckpt", 10)
    import_satclip(file, f"{home}/imported")
    export_satclip(f"{home}/imported", tmp_path / "again.ckpt")
    first, again = (torch.load(p, weights_only=True)["state_dict"] for p in (file, tmp_path / "again.ckpt"))
    for name, tensor in again.items():
        assert torch.equal(tensor, first[name])


def test_a_namespace_of_settings_is_read(home, tmp_path):
    file = satclip_file(tmp_path / "satclip.ckpt", 10)
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"] = argparse.Namespace(**content["hyper_parameters"])
    torch.save(content, file)
    assert import_satclip(file, f"{home}/imported").architecture.degree == 10


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_checkpoint_is_refused_and_not_run(home, tmp_path, capsys):
    file = tmp_path / "evil.ckpt"
    torch.save({"hyper_parameters": {}, "state_dict": {}, "callbacks": Evil()}, file)
    with pytest.raises(UserError, match="without running code"):
        import_satclip(file, f"{home}/imported")
    assert "must not run" not in capsys.readouterr().out


class Callback:
    """A class of a training script, which is not there where the file is read."""

    def __init__(self, path):
        self.path = path


Callback.__module__, Callback.__qualname__ = "lightning.pytorch.callbacks", "Callback"


def test_unknown_classes_in_a_checkpoint_are_stood_in_for(home, tmp_path, monkeypatch):
    """As Lightning writes them: classes, and objects with a state; none of their modules is there, nor imported."""
    file = satclip_file(tmp_path / "satclip.ckpt", 10)
    content = torch.load(file, weights_only=True)
    module = types.ModuleType("lightning.pytorch.callbacks")
    module.Callback = Callback
    with monkeypatch.context() as there:
        for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"):
            there.setitem(sys.modules, name, module)
        kept = {"callbacks": {"best": Callback(pathlib.PurePosixPath("a"))}, "hparams_type": Callback}
        torch.save(content | kept, file)
    import_satclip(file, f"{home}/imported")
    ours = load_checkpoint(f"{home}/imported").location
    theirs = load_satclip_location_encoder(satclip_file(tmp_path / "plain.ckpt", 10))(torch.from_numpy(places()))
    assert relative(embed_by(ours, places()), theirs.detach().numpy()) < 1e-6
    assert "lightning" not in sys.modules


def hostile(path, module, name, *arguments):
    """Writes a checkpoint that calls a function when it is unpickled: the bytes of the call are put in by hand."""
    satclip_file(path, 10)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"callbacks": argparse.Namespace(mark="here")}, path)
    call = f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R"
    members = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            members[member] = archive.read(member)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            if member.endswith("data.pkl"):
                assert data.count(b"X\x04\x00\x00\x00here") == 1
                data = data.replace(b"X\x04\x00\x00\x00here", call)
            archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("os", "system", "touch {}"),
        ("posix", "system", "touch {}"),
        ("subprocess", "getoutput", "touch {}"),
        ("builtins", "exec", "open('{}', 'w')"),
        ("__builtin__", "eval", "open('{}', 'w')"),
        ("pathlib", "Path.touch", "{}"),
        ("torch.hub", "load", "{}"),
        ("evil_package", "run", "{}"),
        ("functools", "partial", "{}"),
    ],
)
def test_a_call_in_a_checkpoint_never_runs(home, tmp_path, monkeypatch, module, name, call):
    """Of Python's functions it is a refusal; of a package's the call makes a stand-in, and no module is imported."""
    (tmp_path / "evil_package.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    file = hostile(tmp_path / "evil.ckpt", module, name, call.format(tmp_path / "ran"))
    if module in ("evil_package", "torch.hub", "functools", "pathlib"):
        import_satclip(file, f"{home}/imported")
    else:
        with pytest.raises(UserError, match="without running code"):
            import_satclip(file, f"{home}/imported")
    assert not (tmp_path / "ran").exists()
    assert "evil_package" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "without running code"),
        (b"", "without running code"),
        (None, "there is no file"),
        ({"state_dict": {}}, "hyper_parameters"),
        ({"le_type": "grid"}, "le_type is 'grid'"),
        ({"legendre_polys": 11}, "not a SatCLIP checkpoint"),
        ({"legendre_polys": 10**6}, "legendre_polys is 1000000: only 1 to 100"),
        ({"capacity": "512"}, "capacity is '512'"),
        ({"embed_dim": -1}, "embed_dim is -1"),
        ({"visual": {"model.location.nnet.layers.1.bias": torch.full((512,), torch.nan)}}, "not finite"),
        ({"visual": {"model.location.nnet.layers.1.bias": "text"}}, "not a SatCLIP checkpoint"),
    ],
)
def test_what_is_no_satclip_checkpoint_is_refused(home, tmp_path, content, message):
    file = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        satclip_file(file, 10, **content) if "state_dict" not in content else torch.save(content, file)
    with pytest.raises(UserError, match=message):
        import_satclip(file, f"{home}/imported")
    assert not storage.names(f"{home}/imported")


def trained(home):
    torch.manual_seed(0)
    images = np.random.default_rng(0).uniform(0, 1, (40, 2, 16, 16)).astype("f4")
    encoder = fit_rcf(images, ("red", "nir"), dim=24)
    features = encoder.encode(images)
    projection = ImageProjection(24, 8).fit(features)
    location = random_encoder(6, hidden=16, dim=8, smoothness=1.0, dropout=0.25)
    card = save_checkpoint(f"{home}/trained", location, projection, encoder, metrics={"loss": 1.5})
    return images, location, projection, encoder, card


def test_a_checkpoint_is_loaded_as_it_was_saved(home):
    images, location, projection, encoder, card = trained(home)
    loaded = load_checkpoint(f"{home}/trained")
    assert loaded.card == card
    stated = {"name": "rcf", "bands": ["red", "nir"], "dim": 24, "resolution_m": None}
    assert storage.read_json(f"{home}/trained/card.json")["encoder"] == stated | {
        "normalisation": encoder.normalisation
    }
    assert card.architecture.smoothness == 1.0
    assert not loaded.location.training
    np.testing.assert_array_equal(loaded.location.embed(places()), location.embed(places()))
    features = encoder.encode(images)
    np.testing.assert_array_equal(loaded.encoder.encode(images), features)
    np.testing.assert_array_equal(keys_of(loaded, features), projection.keys(features))


def test_the_fingerprint_is_of_the_weights(home):
    card = trained(home)[-1]
    assert trained(home)[-1].fingerprint == card.fingerprint
    other = random_encoder(7, hidden=16, dim=8)
    assert save_checkpoint(f"{home}/other", other).fingerprint != card.fingerprint


def test_weights_that_are_not_the_cards_are_refused(home):
    trained(home)
    card = storage.read_json(f"{home}/trained/card.json")
    storage.write(f"{home}/trained/card.json", json.dumps(card | {"fingerprint": "0" * 12}).encode())
    with pytest.raises(UserError, match="not those of its card"):
        load_checkpoint(f"{home}/trained")


@pytest.mark.parametrize(
    ("kind", "network", "head"),
    [("moco_vit16", vision.vit_small, "head"), ("moco_resnet18", vision.resnet18, "fc")],
)
def test_an_imported_image_tower_makes_the_keys_of_satclip(home, tmp_path, kind, network, head):
    """SatCLIP's own way: the tower on DN / 10000 with B10 zero, then its last layer."""
    network = network(13).eval()
    last, visual = random_tower(network, head)
    file = satclip_file(tmp_path / "satclip.ckpt", 10, visual=visual, vision_layers=kind)
    import_satclip(file, f"{home}/imported")
    model = load_checkpoint(f"{home}/imported")
    dn = np.random.default_rng(0).integers(1, 10_000, (2, 12, 224, 224)).astype("f4")
    with torch.no_grad():
        features = network(torch.from_numpy(np.insert(dn / 10_000, 10, 0, axis=1)))
        keys = torch.nn.functional.normalize(last(features), dim=1).numpy()
    found = model.encoder.encode(dn / 10_000)
    np.testing.assert_allclose(found, features.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(keys_of(model, found), keys, atol=1e-5)
    assert model.card.encoder.name == f"satclip-{kind.removeprefix('moco_')}"
    export_satclip(f"{home}/imported", tmp_path / "again.ckpt")
    first, again = (torch.load(p, weights_only=True)["state_dict"] for p in (file, tmp_path / "again.ckpt"))
    assert set(again) == set(first)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_trained_projection_is_folded_into_the_exported_tower(home, tmp_path):
    """Trained on a SatCLIP tower, with standardised features: import of the export gives the same keys."""
    network = vision.resnet18(13)
    encoder = load_tower("satclip-resnet18", {k: v.numpy() for k, v in network.state_dict().items()})
    features = np.random.default_rng(0).normal(3, 2, (50, 512)).astype("f4")
    torch.manual_seed(0)
    projection = ImageProjection(512, 8).fit(features)
    save_checkpoint(f"{home}/ours", random_encoder(6, hidden=16, dim=8), projection, encoder)
    export_satclip(f"{home}/ours", tmp_path / "out.ckpt")
    import_satclip(tmp_path / "out.ckpt", f"{home}/again")
    again = keys_of(load_checkpoint(f"{home}/again"), features)
    np.testing.assert_allclose(again, projection.keys(features), atol=1e-5)


@pytest.mark.parametrize(
    ("visual", "more", "why"),
    [
        ({}, {"vision_layers": "moco_vit16"}, "the file has no model.visual"),
        ({"model.visual.proj": torch.zeros(2)}, {"vision_layers": [3, 4, 6, 3]}, "is none of moco_vit16"),
        ({"model.visual.proj": torch.zeros(2)}, {}, "None is none of"),
    ],
)
def test_another_image_tower_is_left_out_and_the_card_says_so(home, tmp_path, visual, more, why):
    card = import_satclip(satclip_file(tmp_path / "satclip.ckpt", 10, visual=visual, **more), f"{home}/imported")
    assert why in card.image_side
    with pytest.raises(UserError, match="no image projection"):
        keys_of(load_checkpoint(f"{home}/imported"), np.zeros((1, 4), "f4"))


def test_a_damaged_image_tower_is_refused(home, tmp_path):
    _, visual = random_tower(vision.resnet18(13), "fc")
    del visual["model.visual.layer1.0.conv1.weight"]
    file = satclip_file(tmp_path / "satclip.ckpt", 10, visual=visual, vision_layers="moco_resnet18")
    with pytest.raises(UserError, match=r"lack layer1\.0\.conv1\.weight"):
        import_satclip(file, f"{home}/imported")
    assert not storage.names(f"{home}/imported")


def test_nothing_good_is_overwritten(home, tmp_path):
    first = satclip_file(tmp_path / "a.ckpt", 10)
    card = import_satclip(first, f"{home}/imported")
    assert import_satclip(first, f"{home}/imported") == card
    with pytest.raises(UserError, match="holds another checkpoint already: name a directory of its own"):
        import_satclip(satclip_file(tmp_path / "b.ckpt", 11), f"{home}/imported")
    assert load_checkpoint(f"{home}/imported").card == card
    (tmp_path / "out.ckpt").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"out\.ckpt is there already: name another file, or give --overwrite"):
        export_satclip(f"{home}/imported", tmp_path / "out.ckpt")
    assert (tmp_path / "out.ckpt").read_bytes() == b"precious"
    export_satclip(f"{home}/imported", tmp_path / "out.ckpt", overwrite=True)
    assert import_satclip(tmp_path / "out.ckpt", f"{home}/again").fingerprint == card.fingerprint


def test_an_archive_that_expands_beyond_reason_is_refused(home, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="would expand to 10,000,000"):
        import_satclip(tmp_path / "bomb.ckpt", f"{home}/imported")


def test_training_state_survives_storage():
    state = {"weights": torch.arange(3.0), "step": 4, "history": [{"loss": 0.5}]}
    again = parse_state(dump_state(state), "state")
    assert torch.equal(again.pop("weights"), state.pop("weights"))
    assert again == state
