"""How far it goes: what each choice in the model is worth on the demo planet, and how that compares with GeoCLIP.

`python -m tests.benchmarks.study PATCHES [QUESTION …]` prints a Markdown table for each question, or those that are
named, and draws pictures into `docs/` once all are answered. PATCHES is the URL of patches of 32 pixels, such as the
demo's. Whatever was computed stays in `.sandbox/study`: an interrupted study goes on, and a new question costs only
what it alone needs. Real labels come from the folder that `RANGEGRID_FIXTURES` names.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tasks.cards import fingerprint
from tasks.core.encoders.harmonics import spherical_harmonics
from tasks.core.paired import MARKS, Difference, paired
from tasks.model.geoclip import embed_geoclip
from tasks.params import TrainParams
from tasks.patches.store import open_patches
from tasks.plots.charts import score_chart
from tasks.plots.style import FAINT, INK, SECOND, plain, png
from tests.benchmarks.retrieval import machine
from tests.benchmarks.trials import FOLDS, REAL, Point, Scores, Study

HOME = Path(".sandbox/study")
COMPARISON = "beside GeoCLIP"
PICTURE, CHART = Path("docs/geoclip.png"), Path("docs/study.png")
BASE = Point()
CAPTION = (
    "Ridge probes; pale: random split; full: blocks of 10 degrees held out, 3 folds dealt 3 times, 3 training seeds."
)


def satclip(steps: int) -> TrainParams:
    """SatCLIP's own recipe for a smaller training: as many pairs in a batch and views of each as by default here."""
    return TrainParams(preset="satclip").model_copy(update={"steps": steps, "batch": 1024, "views": 1})


def questions() -> dict[str, dict[str, Point]]:
    """What is asked: per question the configurations, the default first, one factor at a time around it."""
    t = BASE.trained
    semantic, geodesic = "semantic:16", "geodesic:2000"  # what the values of BASE choose, as each table tells

    def heads(*told: str) -> Point:
        return replace(BASE, heads=told)

    def seen(*names: str, dims: int = 128) -> Point:
        return replace(BASE, values=names, dims=dims, heads=(semantic, geodesic))

    def projected(how: str, dims: int = 128) -> Point:
        return replace(seen("rcf", dims=dims), projection=how)

    return {
        "heads": {
            "chosen by the values": BASE,
            "location encoder alone": replace(BASE, method="none"),
            "RANGE": replace(BASE, method="range"),
            "RANGE+": replace(BASE, method="range+"),
            **{" ".join(told): heads(*told) for told in (
                (semantic,),
                (geodesic,),
                (semantic, "nearest:8"),
                (semantic, "geodesic:40", geodesic),
                (semantic, "nearest:4", "nearest:16", "nearest:64"),
            )},
        },
        "values": {
            "rcf, 128 rotated components": BASE,
            "not standardised": projected("not standardised"),
            "64 components": projected("rotated", 64),
            "with colours": seen("rcf", "colours"),
        },
        "semantic temperature": {"16": BASE} | {f"{n}": heads(f"semantic:{n}", geodesic) for n in (4, 8, 24, 48)},
        "geodesic temperature": {
            "2,000": BASE,
            **{f"{n:,}": heads(semantic, f"geodesic:{n}") for n in (40, 500, 5000, 20_000)},
        },
        "more values": {
            "rcf, 128 rotated components": BASE,
            "with the middle 16 pixels": seen("rcf", "rcf@16"),
            "256 components": projected("rotated", 256),
            "not rotated": projected("not rotated"),
            "with rcf of another seed": seen("rcf", "rcf of another seed"),
            "with EfficientNet-Lite0": seen("rcf", "EfficientNet-Lite0"),
        },
        "members": {str(n): t(members=n) for n in (1, 3)},
        "patch": {"32 pixels": BASE, "the middle 16 pixels": replace(BASE, sees="rcf@16", values=("rcf@16",))},
        "location encoder": {name: t(location=name) for name in ("harmonics", "tessellation")},
        "recipe": {"ours": BASE, "SatCLIP's": replace(BASE, train=satclip(150))},
        "images": {f"{n:,}": replace(BASE, images=n) for n in (10_000, 5000, 2500)},
        "width": {
            "hidden 512, 256 dimensions": BASE,
            "hidden 256": t(hidden=256),
            "hidden 1,024": t(hidden=1024),
            "128 dimensions": t(dim=128),
            "512 dimensions": t(dim=512),
        },
        "degree": {str(n): t(degree=n) for n in (20, 10, 30, 40)},
        "smoothness": {f"{s:g}": t(smoothness=s) for s in (2, 0, 1, 3)},
        "steps": {str(n): t(steps=n) for n in (150, 75, 300)},
    }  # fmt: skip


def main() -> None:
    """Answers the questions that are named, or all."""
    url, *named = sys.argv[1:]
    study = Study(open_patches(url), HOME / fingerprint(url))
    print(machine(), flush=True)
    asked = named or [*questions(), COMPARISON]
    for name in asked:
        print(f"\n### {name}\n", flush=True)
        if name == COMPARISON:
            compare(study)
        else:
            answer(study, questions()[name])
    CHART.write_bytes(chart(study, [name for name in asked if name != COMPARISON]))


def answer(study: Study, points: dict[str, Point]) -> None:
    """Prints what each configuration reaches, and the difference of its blocked mean to the first."""
    print("| | numbers | mean | blocked, minus the first | " + " | ".join(REAL) + " |\n|" + "---|" * (4 + len(REAL)))
    first: list[Scores] = []
    for label, point in points.items():
        found = study.scores(point)
        first = first or found
        told = "" if found is first else difference(found, first)
        real = [pair([task(run, name) for run in found], 0) for name in REAL if name in found[0]]
        cells = [label, f"{found[0]['dims']:,}", pair([overall(run) for run in found], 3), told, *real]
        print("| " + " | ".join(cells) + " |", flush=True)
    chosen = {label: " ".join(study.heads(point)) for label, point in points.items() if chooses(point)}
    print("\nHeads: " + "; ".join(f"{label}: {heads}" for label, heads in chosen.items()), flush=True)


def chooses(point: Point) -> bool:
    """Whether the values choose the heads."""
    return point.method == "multi-head" and not point.heads


def task(run: Scores, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scores of a task by split, random and blocked."""
    return np.array(run[name]["random"]), np.array(run[name]["blocked"])


def overall(run: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means over all tasks by split, random and blocked."""
    random, blocked = zip(*(task(run, name) for name in run if name != "dims"), strict=True)
    return np.mean(random, axis=0), np.mean(blocked, axis=0)


def pair(runs: list[tuple[NDArray[np.float64], NDArray[np.float64]]], spread: int) -> str:
    """Random and blocked mean over seeds of what is trained, the latter with its deviation where digits are asked."""
    means = np.array([[split.mean() for split in run] for run in runs])
    random, blocked = means.mean(0)
    if not spread or not np.ptp(means[:, 1]):
        return f"{random:.3f} / {blocked:.3f}"
    return f"{random:.3f} / {blocked:.3f} ± {means[:, 1].std(ddof=1):.{spread}f}"


def difference(found: list[Scores], first: list[Scores]) -> str:
    """The difference of blocked means with its interval over splits; marked if every training seed has its sign."""
    ours, theirs = (np.array([overall(run)[1] for run in runs]) for runs in (found, first))
    told = paired(ours.mean(0), theirs.mean(0), 1 / (FOLDS - 1))
    return f"{told.mean:+.3f} ({told.low:+.3f} to {told.high:+.3f}) {mark(told, (ours - theirs).mean(1))}".strip()


def mark(told: Difference, by_seed: NDArray[np.float64]) -> str:
    """▲ or ▼ beyond the noise of places, where all training seeds agree."""
    agree = len(set(np.sign(by_seed))) == 1
    return MARKS.get(told.verdict, "") if agree else ""


def chart(study: Study, asked: list[str]) -> bytes:
    """A panel per question: blocked means of each training seed, and their mean."""
    columns = min(3, len(asked))
    rows = -(-len(asked) // columns)
    figure = Figure(figsize=(5.4 * columns, 1 + 2.6 * rows), facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    default = np.mean(means(study, BASE))
    for axes, name in zip(panels, asked, strict=False):
        points = questions()[name]
        for place, point in zip(range(len(points))[::-1], points.values(), strict=True):
            found = means(study, point)
            axes.plot(found, [place] * len(found), "o", color=SECOND, ms=5, alpha=0.45)
            axes.plot(np.mean(found), place, "|", color=INK, ms=13, mew=2)
        axes.axvline(default, color=FAINT, lw=0.8, ls=":")
        axes.set_yticks(range(len(points))[::-1], points, fontsize=8.5, color=INK)
        axes.set_ylim(-0.7, len(points) - 0.3)
        axes.set_title(name, fontsize=11, color=INK, loc="left")
        plain(axes, "x")
    for axes in panels[len(asked) :]:
        axes.set_axis_off()
    title = "Mean score, blocks held out: three training seeds (dots), their mean (bars), the default (dotted)"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    return png(figure)


def means(study: Study, point: Point) -> list[float]:
    """The blocked mean over tasks and splits of each training seed."""
    return [float(overall(run)[1].mean()) for run in study.scores(point)]


def compare(study: Study) -> None:
    """Prints and draws the scores by task beside GeoCLIP's, mean and deviation over seeds of what was trained."""
    harmonics = study.kept("harmonics", lambda lonlat: spherical_harmonics(lonlat, 20).astype(np.float32))
    found = {"spherical harmonics": [harmonics], "GeoCLIP": [study.kept("geoclip", embed_geoclip)]}
    methods = {"location encoder": "none", "RANGE": "range", "RANGE+": "range+", "multi-head": "multi-head"}
    found |= {name: study.scores(replace(BASE, method=method)) for name, method in methods.items()}
    names = [one.name for one in study.probed]
    print("| random / blocked | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, runs in found.items():
        cells = [pair([task(run, one) for run in runs], 3) for one in names]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    PICTURE.write_bytes(score_chart(_long(study, found), "Beside GeoCLIP, from Blue Marble alone", CAPTION))


def _long(study: Study, found: dict[str, list[Scores]]) -> pd.DataFrame:
    rows = []
    for name, runs in found.items():
        for one in study.probed:
            random, blocked = np.mean([[split.mean() for split in task(run, one.name)] for run in runs], axis=0)
            metric = "accuracy" if one.kind == "classification" else "R²"
            rows.append((one.name, metric, name, random, blocked))
    return pd.DataFrame(rows, columns=["task", "metric", "embedder", "random", "blocked"])


if __name__ == "__main__":
    main()
