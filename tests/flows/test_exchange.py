"""`rangegrid checkpoint` and `rangegrid database` as their user meets them, by relative path and by URL."""

import json
import sys

import numpy as np
import pytest
import torch
from rangegeo import RANGE

from flows.cli import main
from tasks.core.encoders import vision
from tasks.params import EmbedParams
from tasks.points.embed import embed_points
from tests.flows.test_cli import run
from tests.tasks.model.test_checkpoint import random_tower, satclip_file

PLACES = np.array([[2.35, 48.86], [-179.9, -30.0], [0.0, 89.0]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a SatCLIP checkpoint and a database as others publish them."""
    monkeypatch.chdir(tmp_path)
    _, visual = random_tower(vision.resnet18(13), "fc")
    satclip_file("satclip.ckpt", 10, visual=visual, vision_layers="moco_resnet18")
    rng = np.random.default_rng(0)
    locations = np.c_[rng.uniform(-180, 180, 200), rng.uniform(-90, 90, 200)]
    hidden = np.c_[np.cos(np.radians(locations)), np.sin(np.radians(locations))]
    tables = {"satclip_embeddings": 256, "image_embeddings": 40}
    tables = {name: (hidden @ rng.normal(size=(4, width))).astype("f4") for name, width in tables.items()}
    np.savez("range_db.npz", locs=locations, **tables)
    return tmp_path


@pytest.fixture
def rangegrid(monkeypatch, capsys):
    """The command in this process: exit status, what it printed, what it said."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rangegrid", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, " ".join(captured.err.split())

    return call


def test_there_and_back(folder, rangegrid):
    """Imported by relative path and by URL, exported again, and rangegeo and we say the same."""
    code, out, said = rangegrid("checkpoint", "import", "satclip.ckpt", "space")
    assert (code, out.strip(), said) == (0, (folder / "space").as_uri(), "image encoder satclip-resnet18")
    source, target = (folder / "range_db.npz").as_uri(), (folder / "database").as_uri()
    assert rangegrid("database", "import", source, target, "--checkpoint", "space")[:2] == (0, f"{target}\n")
    assert rangegrid("checkpoint", "export", "space", "out.ckpt")[0] == 0
    assert rangegrid("database", "export", "database", (folder / "out.npz").as_uri())[0] == 0
    theirs = RANGE("RANGE+", pretrained_path="out.ckpt", db_path="out.npz").encode(PLACES)
    ours = embed_points(PLACES, "space", "database", EmbedParams(method="range+"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_audit_tells_good_from_shuffled(folder, rangegrid):
    rangegrid("checkpoint", "import", "satclip.ckpt", "space")
    rangegrid("database", "import", "range_db.npz", "good", "--checkpoint", "space")
    code, out, _ = rangegrid("database", "audit", "good", "--checkpoint", "space")
    assert code == 0, out
    assert [line[:4].strip() for line in out.splitlines()] == ["ok", "ok", "ok", "-", *["ok"] * 6]
    with np.load("range_db.npz") as file:
        arrays = dict(file)
    arrays["image_embeddings"] = np.random.default_rng(0).permutation(arrays["image_embeddings"])
    np.savez("shuffled.npz", **arrays)
    rangegrid("database", "import", "shuffled.npz", "bad", "--checkpoint", "space")
    code, out, _ = rangegrid("database", "audit", "bad", "--json")
    assert code == 1
    wrong = [finding["check"] for finding in json.loads(out) if finding["passed"] is False]
    assert wrong == ["values and keys", "places and values"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint", "import", "range_db.npz", "a"], "no checkpoint that can be read without running code"),
        (["checkpoint", "import", "nowhere.ckpt", "a"], "there is no file nowhere.ckpt"),
        (["checkpoint", "export", "space", "satclip.ckpt"], "is there already: name another file, or give --overwrite"),
        (["checkpoint", "export", "nowhere", "a.ckpt"], "there is no finished checkpoint at file://"),
        (["database", "import", "satclip.ckpt", "a", "--checkpoint", "space"], "satclip.ckpt lacks an array"),
        (["database", "import", "range_db.npz", "a", "--checkpoint", "b"], "there is no finished checkpoint at"),
        (["database", "export", "space", "a.npz"], "holds 'checkpoint', not 'database'"),
        (["database", "audit", "space"], "holds 'checkpoint', not 'database'"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, rangegrid, arguments, message):
    rangegrid("checkpoint", "import", "satclip.ckpt", "space")
    code, out, said = rangegrid(*arguments)
    assert (code, out) == (2, "")
    assert message in said
    assert not (folder / "a").exists()


def test_the_command_itself(folder):
    ran = run("checkpoint", "import", "satclip.ckpt", "space")
    assert ran.returncode == 0, ran.stderr
    assert torch.load("satclip.ckpt", weights_only=True)["epoch"] == 3  # the source is as it was
