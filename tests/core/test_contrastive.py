"""The loss against its definition, resuming against an unbroken run, and learning what can be learnt."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing import spawn
from torch.nn import functional

from tasks.core.contrastive import ImageProjection, info_nce, near_pairs
from tasks.core.encoders.location import LocationEncoder
from tasks.core.training import (
    Batches,
    Pairs,
    Progress,
    Schedule,
    Trainer,
    hold_out,
    jittered,
    plan,
    retrieval_accuracy,
    train,
)
from tests.core.feature_array import FeatureArray


def unit(n, dim, seed):
    values = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(values, dim=-1).requires_grad_()


def direct(places, images, scale, near=None):
    logits, own = scale * places @ images.T, torch.arange(len(places))
    if near is not None:
        logits = logits.masked_fill(near, -torch.inf)
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


def scattered(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.c_[rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))]


def great_circle_km(lonlat):
    """Haversine in float64, all by all."""
    lon, lat = np.radians(lonlat).T
    half = np.sin((lat[:, None] - lat) / 2) ** 2
    half += np.cos(lat)[:, None] * np.cos(lat) * np.sin((lon[:, None] - lon) / 2) ** 2
    return 2 * 6371.0088 * np.arcsin(np.sqrt(half.clip(0, 1)))


def close(lonlat, km):
    near = torch.from_numpy(great_circle_km(lonlat) <= km)
    return near & ~torch.eye(len(lonlat), dtype=torch.bool)


@pytest.mark.parametrize("km", [1e-3, 50.0, 1500.0, 25_000.0])
def test_near_pairs_are_those_of_the_great_circle(km):
    lonlat = np.concatenate([scattered(200), scattered(200) + 1e-9, [[180, 10], [-180, 10], [0, 90], [90, 90]]])
    found = near_pairs(lonlat.clip(-180, 180), km)
    assert torch.equal(found, close(lonlat.clip(-180, 180), km).nonzero())


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
@pytest.mark.parametrize("km", [0.001, 2000.0, 21_000.0])
def test_masked_loss_and_gradients_are_the_direct_ones(chunk, km):
    lonlat = scattered(24)
    lonlat[3] = lonlat[17]
    inputs = unit(24, 6, 0), unit(24, 6, 1), torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    ours = info_nce(*inputs, chunk, near_pairs(lonlat, km))
    theirs = direct(*inputs, close(lonlat, km))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_large_float32_batch_is_the_direct_float64_one():
    exact = unit(2500, 32, 0), unit(2500, 32, 1), torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    inputs = [value.detach().float().requires_grad_() for value in exact]
    ours, theirs = info_nce(*inputs), direct(*exact)
    assert abs(ours.item() - theirs.item()) < 1e-6 * theirs.item()
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, exact), strict=True):
        assert (a - b).abs().max() < 1e-6 * max(1.0, b.abs().max().item())


@pytest.fixture(scope="module")
def pairs():
    """Images that tell their place but for noise."""
    lonlat, rng = scattered(400), np.random.default_rng(1)
    lon, lat = np.radians(lonlat).T
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    features = (sphere @ rng.normal(size=(3, 12)) + 0.05 * rng.normal(size=(2, 400, 12))).astype("f4")
    return Pairs(lonlat, FeatureArray(features), hold_out(lonlat, 20, 0.2, 0))


SCHEDULE = Schedule(60, 64, 1e-2, 0.01, 5, seed=3)


def new_trainer(pairs, dropout=0.1, **changes):
    torch.manual_seed(0)
    location = LocationEncoder(degree=5, hidden=32, dim=16, dropout=dropout, smoothness=1)
    projection = ImageProjection(12, 16).fit(pairs.features.values[0])
    return Trainer(location, projection, replace(SCHEDULE, **changes))


def run(trainer, pairs, every=20):
    for _ in train(trainer, pairs, every):
        pass
    return trainer


def weights_of(trainer):
    return [*trainer.location.parameters(), *trainer.projection.parameters(), trainer.log_scale]


def test_training_learns_held_out_blocks(pairs):
    history = run(new_trainer(pairs, dropout=0.0), pairs).history
    assert [p.step for p in history] == [20, 40, 60]
    assert history[-1].loss < history[0].loss
    assert history[-1].held_out_loss < 0.7 * math.log(pairs.held_out.sum())
    assert history[-1].accuracy > 0.08  # chance is 0.01


@pytest.mark.parametrize(
    "changes", [{}, {"patience": 3, "mask_km": 300.0}, {"precision": "bf16"}, {"jitter_degrees": 2.0}]
)
def test_resumed_training_is_bit_exact(pairs, changes):
    whole = run(new_trainer(pairs, **changes), pairs, 10)
    broken, saved = new_trainer(pairs, **changes), io.BytesIO()
    for _ in train(broken, pairs, 10):
        if broken.step_number == 33:  # between two measurements
            torch.save(broken.state(), saved)
            break
    torch.manual_seed(999)
    resumed = new_trainer(pairs, **changes)
    resumed.restore(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    run(resumed, pairs, 10)
    for ours, theirs in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.history == whole.history


def test_places_are_moved_anew_in_each_step_and_stay_on_earth():
    lonlat = np.concatenate([scattered(2000), [[180, 10], [-180, -10], [0, 90], [90, -90]]])
    schedule = replace(SCHEDULE, jitter_degrees=0.5)
    first, second = jittered(lonlat, schedule, 7), jittered(lonlat, schedule, 8)
    np.testing.assert_array_equal(jittered(lonlat, schedule, 7), first)
    assert (first != second).any(axis=1).all()
    assert abs(first[:, 0]).max() <= 180
    assert abs(first[:, 1]).max() <= 90
    east = (first[:, 0] - lonlat[:, 0] + 180) % 360 - 180
    for moved in (east, first[:2000, 1] - lonlat[:2000, 1]):
        assert 0.49 < abs(moved).max() <= 0.5 + 1e-9
        assert abs(moved.mean()) < 4 * 0.5 / np.sqrt(3 * 2000)  # no shift: four standard errors of a uniform mean


def test_moved_places_are_what_is_trained_on(pairs):
    """A jitter that no float32 can tell trains as none does, a large one otherwise."""
    plain, tiny, large = (
        run(new_trainer(pairs, dropout=0.0, jitter_degrees=degrees), pairs).history[-1].loss
        for degrees in (0, 1e-12, 5.0)
    )
    assert tiny == pytest.approx(plain, rel=1e-4)
    assert large > plain * 1.01


def test_bf16_trains_as_float32_does(pairs):
    full, half = (
        run(new_trainer(pairs, dropout=0.0, precision=name), pairs).history[-1] for name in ("float32", "bf16")
    )
    assert half != full
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.held_out_loss == pytest.approx(full.held_out_loss, rel=0.02)


def test_weights_stay_float32_in_bf16(pairs):
    trainer = run(new_trainer(pairs, precision="bf16", steps=2), pairs)
    assert {weight.dtype for weight in weights_of(trainer)} == {torch.float32}


def test_without_a_better_measurement_training_ends_with_the_best_weights(pairs):
    trainer, seen = new_trainer(pairs, patience=2, steps=400, lr=0.05), {}
    for now in train(trainer, pairs, 5):
        if now:
            seen[now.step] = [weight.clone() for weight in weights_of(trainer)]
    best = trainer.result
    assert trainer.step_number < 400
    assert trainer.step_number == best.step + 2 * 5
    assert best.accuracy == max(p.accuracy for p in trainer.history)
    for kept, then in zip(weights_of(trainer), seen[best.step], strict=True):
        assert torch.equal(kept, then)


def test_of_equal_accuracies_the_lower_loss_is_the_better(pairs):
    trainer = new_trainer(pairs, patience=5)
    for step, accuracy, loss in [(1, 0.5, 3.0), (2, 0.5, 2.0), (3, 0.5, 2.0), (4, 0.4, 1.0)]:
        trainer.note(Progress(step, 0.0, 1.0, accuracy, loss))
    assert trainer.result.step == 2


@given(
    n=st.integers(1, 300),
    size=st.integers(1, 40),
    run=st.integers(1, 50),
    window=st.integers(1, 400),
    views=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_pair_is_seen_at_most_once_a_turn(n, size, run, window, views, seed):
    rows = np.flatnonzero(np.random.default_rng(seed).random(n) < 0.8)
    if len(rows) < size:
        return
    batches, again = (Batches(rows, size, seed, run, window, views) for _ in range(2))
    a_turn = len(rows) // size
    for first in (0, a_turn):
        seen = np.concatenate([batches(step)[0] for step in range(first, first + a_turn)])
        assert len(np.unique(seen)) == len(seen) == a_turn * size
        assert np.isin(seen, rows).all()
    step = a_turn + a_turn // 2  # reached from anywhere, it is the same
    np.testing.assert_array_equal(batches(step), again(step))
    row, view = batches(step)
    assert ((view >= 0) & (view < views)).all()
    assert len({(r // run, v) for r, v in zip(row, view, strict=True)}) == len(set(row // run))


def test_a_window_bounds_what_is_read_together():
    batches = Batches(np.arange(10_000), 100, seed=0, run=50, window=1000)
    windows = [np.concatenate([batches(step)[0] for step in range(i, i + 10)]) for i in range(0, 100, 10)]
    for rows in windows:
        assert len(np.unique(rows // 50)) == 20
        assert np.abs(np.diff(rows)).mean() > 1000  # the runs come from everywhere


def test_the_shuffle_is_uniform_where_all_fits():
    counts = np.zeros((20, 20))
    for turn in range(4000):
        counts[np.arange(20), Batches(np.arange(20), 20, seed=0, run=6)(turn)[0]] += 1
    assert np.abs(counts / 4000 - 1 / 20).max() < 0.02  # 5.8 standard deviations


def test_views_are_all_seen():
    batches = Batches(np.arange(400), 100, seed=0, run=20, views=8)
    seen = np.concatenate([batches(step)[1] for step in range(80)])
    assert np.bincount(seen, minlength=8).min() > 0.07 * len(seen)


def test_a_batch_beyond_the_pairs_is_refused(pairs):
    with pytest.raises(ValueError, match=r"a batch of 350 pairs needs more than the \d+ there are"):
        plan(pairs.held_out, replace(SCHEDULE, batch=350), 1, 1)


def test_scale_is_clamped(pairs):
    trainer = new_trainer(pairs)
    trainer.log_scale.data.fill_(10.0)
    features = torch.from_numpy(pairs.features.values[0, :64])
    trainer.step(trainer.location.harmonics(pairs.lonlat[:64]), features)
    assert trainer.log_scale.item() <= math.log(100) + 1e-6


def _of_two(rank, folder, pairs):
    """What each of two processes computes: the gathered loss and its gradients, then some steps of training."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    part = [unit(24, 6, seed).detach()[12 * rank : 12 * rank + 12].requires_grad_() for seed in (0, 1)]
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    losses = [info_nce(*part, scale, chunk, near_pairs(scattered(24), 2000.0), gather=True) for chunk in (5, 1000)]
    found = [[loss.detach(), *torch.autograd.grad(loss, [*part, scale])] for loss in losses]
    first = run(new_trainer(pairs, dropout=0.0, mask_km=300.0, steps=1), pairs)
    trainer = run(new_trainer(pairs, dropout=0.0, mask_km=300.0, steps=12), pairs, 4)
    grads = [weight.grad for weight in weights_of(first)]
    torch.save((found, grads, weights_of(trainer), trainer.state()["history"]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, pairs):
    """The two processes' results."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(_of_two, (folder, pairs), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("chunk", [0, 1])
def test_gathered_loss_and_gradients_are_those_of_one_process(of_two, chunk):
    ranks = [found[chunk] for found, *_ in of_two]
    inputs = unit(24, 6, 0), unit(24, 6, 1), torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    expected = direct(*inputs, close(scattered(24), 2000.0))
    to_places, to_images, to_scale = torch.autograd.grad(expected, inputs)
    for loss, *_ in ranks:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for i, grad in ((1, to_places), (2, to_images)):
        torch.testing.assert_close(torch.cat([ranks[0][i], ranks[1][i]]), grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ranks[0][3] + ranks[1][3], to_scale, rtol=1e-9, atol=1e-12)


def test_two_processes_have_the_gradients_of_one(of_two, pairs):
    alone = run(new_trainer(pairs, dropout=0.0, mask_km=300.0, steps=1), pairs)
    for _, grads, *_ in of_two:
        for ours, one in zip(grads, (weight.grad for weight in weights_of(alone)), strict=True):
            assert (ours - one).abs().max() < 1e-6 * max(1.0, one.abs().max().item())


def test_two_processes_end_with_the_weights_of_one(of_two, pairs):
    alone = run(new_trainer(pairs, dropout=0.0, mask_km=300.0, steps=12), pairs, 4)
    (*_, found, history), (*_, other, _) = of_two
    for ours, theirs, one in zip(found, other, weights_of(alone), strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, one, rtol=1e-3, atol=1e-5)
    assert [p["loss"] for p in history] == pytest.approx([p.loss for p in alone.history], rel=1e-5)


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
    features = pairs.features.values[0]
    projection = ImageProjection(12, 16).fit(features)
    keys = projection.keys(features)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)
    scaled = (features - features.mean(0)) / features.std(0)
    expected = scaled @ projection.linear.weight.detach().numpy().T + projection.linear.bias.detach().numpy()
    np.testing.assert_allclose(keys, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
