"""The loss against its definition, resuming against an unbroken run, and learning what can be learnt."""

import io
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tasks.core.contrastive import (
    ImageProjection,
    Pairs,
    Schedule,
    Trainer,
    hold_out,
    info_nce,
    retrieval_accuracy,
    train,
)
from tasks.core.location import LocationEncoder


def unit(n, dim, seed):
    values = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(values, dim=-1).requires_grad_()


def direct(places, images, scale):
    logits, own = scale * places @ images.T, torch.arange(len(places))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
@pytest.mark.parametrize("value", [1 / 0.07, 100.0])
def test_chunked_loss_and_gradients_are_the_direct_ones(chunk, value):
    inputs = unit(24, 6, 0), unit(24, 6, 1), torch.tensor(value, dtype=torch.float64, requires_grad=True)
    ours, theirs = info_nce(*inputs, chunk), direct(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, s, 2), (unit(5, 3, 0), unit(5, 3, 1), scale))


@pytest.fixture(scope="module")
def pairs():
    """Images that tell their place but for noise."""
    rng = np.random.default_rng(0)
    lonlat = np.c_[rng.uniform(-180, 180, 400), np.degrees(np.arcsin(rng.uniform(-1, 1, 400)))]
    lon, lat = np.radians(lonlat).T
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    features = (sphere @ rng.normal(size=(3, 12)) + 0.05 * rng.normal(size=(400, 12))).astype("f4")
    return Pairs(lonlat, features, hold_out(lonlat, 20, 0.2, 0))


def new_trainer(pairs, steps=60, dropout=0.1):
    torch.manual_seed(0)
    location = LocationEncoder(degree=5, hidden=32, dim=16, dropout=dropout, smoothness=1)
    projection = ImageProjection(12, 16).fit(pairs.features)
    return Trainer(location, projection, Schedule(steps, 64, 1e-2, 0.01, 5, seed=3))


def test_training_learns_held_out_blocks(pairs):
    history = []
    train(new_trainer(pairs, dropout=0.0), pairs, 20, history.append)
    assert [p.step for p in history] == [20, 40, 60]
    assert history[-1].loss < history[0].loss
    assert history[-1].held_out_loss < 0.7 * math.log(pairs.held_out.sum())
    assert history[-1].accuracy > 0.08  # chance is 0.01


class Killed(Exception):
    pass


def test_resumed_training_is_bit_exact(pairs):
    whole = new_trainer(pairs)
    train(whole, pairs, 10, lambda _: None)
    saved = io.BytesIO()
    broken = new_trainer(pairs)

    def kill(progress):
        if progress.step == 30:
            torch.save(broken.state(), saved)
            raise Killed

    with pytest.raises(Killed):
        train(broken, pairs, 10, kill)
    torch.manual_seed(999)
    resumed = new_trainer(pairs)
    resumed.restore(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    train(resumed, pairs, 10, lambda _: None)
    for name, value in whole.location.state_dict().items():
        assert torch.equal(value, resumed.location.state_dict()[name]), name
    assert torch.equal(whole.log_scale, resumed.log_scale)


def test_every_pair_is_seen_once_a_turn(pairs):
    trainer = new_trainer(pairs)
    seen = torch.cat([trainer.rows(256) for _ in range(4)])
    assert torch.equal(seen.sort().values, torch.arange(256))
    assert len(trainer.rows(10)) == 10


def test_scale_is_clamped(pairs):
    trainer = new_trainer(pairs)
    trainer.log_scale.data.fill_(10.0)
    features = torch.from_numpy(pairs.features[:64])
    trainer.step(trainer.location.harmonics(pairs.lonlat[:64]), features)
    assert trainer.log_scale.item() <= math.log(100) + 1e-6


def test_schedule():
    schedule = Schedule(steps=100, batch=1, lr=2.0, weight_decay=0, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert np.all(np.diff(rates[10:]) < 0)


def test_held_out_blocks_are_whole(pairs):
    shifted = np.floor((pairs.lonlat + np.array([180, 90])) / 20).astype(int)
    held, rest = (set(map(tuple, shifted[mask])) for mask in (pairs.held_out, ~pairs.held_out))
    assert not held & rest
    assert len(held) == round(0.2 * len(held | rest))


def test_retrieval_accuracy():
    images = np.eye(200, dtype="f4")
    assert retrieval_accuracy(images, images) == 1
    assert retrieval_accuracy(np.roll(images, 1, 0) + 0.5 * images, images, 0.001) == 0
    assert retrieval_accuracy(np.roll(images, 1, 0) + 0.5 * images, images, 0.01) == 1
    assert retrieval_accuracy(images[:0], images[:0]) == 0


def test_keys_are_unit_and_standardised(pairs):
    projection = ImageProjection(12, 16).fit(pairs.features)
    keys = projection.keys(pairs.features)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)
    scaled = (pairs.features - pairs.features.mean(0)) / pairs.features.std(0)
    expected = scaled @ projection.linear.weight.detach().numpy().T + projection.linear.bias.detach().numpy()
    np.testing.assert_allclose(keys, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
