"""The gate: what may be promoted, and what a refusal says."""

import pytest

from tasks.release.gate import ScoreCard, gate


def row(task, embedder, blocked, **facts):
    return {
        "task": task, "embedder": embedder, "metric": "R²", "blocked": blocked,
        "n": 900, "block_degrees": 10.0, "folds": 5, "labels": "abc", **facts,
    }  # fmt: skip


def card(product="grid", **scores):
    """A score card: by task the product's score, above coordinates of 0.2."""
    rows = [row(task, product, score) for task, score in scores.items()]
    return {"product": product, "scores": rows + [row(task, "coordinates", 0.2) for task in scores]}


def judged(new, current, margin):
    """What the gate says of score cards as they are stored."""
    return gate(ScoreCard(**new), ScoreCard(**current) if current else None, margin)


def test_a_first_card_that_beats_coordinates_passes():
    assert judged(card(temperature=0.9, elevation=0.21), None, 0.02) == []


def test_a_fall_within_the_margin_passes():
    assert judged(card(temperature=0.885), card(temperature=0.9), 0.02) == []
    assert judged(card(temperature=0.95), card(temperature=0.9), 0.0) == []


def test_a_fall_beyond_the_margin_says_which_task_and_by_how_much():
    (refusal,) = judged(card(temperature=0.85, elevation=0.6), card(temperature=0.9, elevation=0.6), 0.02)
    assert (refusal.task, refusal.by) == ("temperature", pytest.approx(0.05))
    assert str(refusal) == (
        "temperature: blocked R² fell from 0.9000 to 0.8500, by 0.0500, more than the margin of 0.02"
    )


@pytest.mark.parametrize("score", [0.1, 0.2])
def test_what_does_not_beat_coordinates_is_refused_even_as_the_first(score):
    (refusal,) = judged(card(temperature=0.9, elevation=score), None, 0.02)
    assert refusal.task == "elevation"
    assert f"{score:.4f} is not above the 0.2000 of coordinates, short by {0.2 - score:.4f}" in str(refusal)


def test_another_name_of_the_product_is_compared_all_the_same():
    assert judged(card("grid", temperature=0.9), card("RANGE+", temperature=0.9), 0.01) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 800}, "n is 800, and was 900"),
        ({"block_degrees": 5.0}, "block_degrees is 5.0"),
        ({"labels": "x"}, "labels"),
    ],
)
def test_other_places_or_blocks_are_not_compared(change, message):
    new = card(temperature=0.9)
    new["scores"] = [entry | change for entry in new["scores"]]
    (refusal,) = judged(new, card(temperature=0.9), 0.02)
    assert message in str(refusal)


def test_a_task_that_was_left_out_is_refused():
    (refusal,) = judged(card(temperature=0.9), card(temperature=0.9, elevation=0.6), 0.02)
    assert "elevation: the product in force was scored on it, this one was not" in str(refusal)


def test_a_card_without_scores_of_its_product_or_of_coordinates_is_refused():
    assert "no scores of its product" in str(judged({"product": "grid", "scores": []}, None, 0.02)[0])
    bare = {"product": "grid", "scores": [row("temperature", "grid", 0.9)]}
    assert "coordinates were not scored" in str(judged(bare, None, 0.02)[0])


def test_of_few_images_no_score_tells_what_they_add_and_coordinates_are_the_baseline():
    splits = {"blocked_splits": [0.3, 0.31, 0.3, 0.32], "fold_seeds": 2, "folds": 2}
    rows = [row("elevation", name, 0.3075, **splits) for name in ("grid", "location encoder")]
    rows += [row("elevation", "coordinates", 0.2, **splits)]
    (refusal,) = judged({"product": "grid", "scores": rows}, None, 0.02)
    assert "not above the location encoder beyond noise" in str(refusal)
    assert judged({"product": "grid", "scores": rows, "few_images": True}, None, 0.02) == []
