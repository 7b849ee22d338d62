"""Pictures of scores: errors on the map, geographic bias, ablations."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tasks.plots.maps import ACCENT, FAINT, INK, SECOND, canvas, equal_earth, outline, plain, png

COLOURS = (ACCENT, SECOND, "#6a8f3c", "#8a5fa8", "#b8912b", "#4a6fa5", "#b5524b", "#5c9a94")
ERRORS = LinearSegmentedColormap.from_list("errors", ["#b4c1cb", SECOND, "#7a1022"])
COLUMNS = 5  # panels in a row, at most


def error_map(lonlat: NDArray[np.float64], lost: NDArray[np.float64], title: str, caption: str) -> bytes:
    """Where a probe errs: each place by its loss, the worst on top.

    Args:
        lonlat: Places, (n, 2) in degrees.
        lost: (n,) from 0, right, upwards; beyond 1 all is one colour.
        title: Above the map.
        caption: Below it.
    """
    figure, axes = canvas(12, 6.6, title, caption)
    outline(axes)
    order = np.argsort(lost, kind="stable")
    x, y = equal_earth(*lonlat[order].T)
    axes.scatter(x, y, c=lost[order], cmap=ERRORS, vmin=0, vmax=1, s=5, linewidths=0)
    return png(figure)


def bias_chart(failures: pd.DataFrame, title: str, caption: str) -> bytes:
    """Scores by continent, by latitude and by distance, a line per task, with standard errors.

    Args:
        failures: As `where_it_fails` gives them.
        title: Above the chart.
        caption: Below it.
    """
    kinds = list(failures["by"].unique())
    figure, panels = _panels(len(kinds), title, caption, height=4.4)
    for axes, by in zip(panels, kinds, strict=True):
        part = failures[failures["by"] == by]
        groups = (
            list(part["group"].unique()) if by == "continent" else sorted(part["group"].unique(), key=_first_number)
        )
        for colour, (task, rows) in zip(_colours(), part.groupby("task", sort=False), strict=False):
            _line(axes, [groups.index(g) for g in rows["group"]], rows["score"], rows["std"], colour, str(task))
        axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
        axes.set_title(by, fontsize=10, color=INK, loc="left")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    return png(figure)


def ablation_chart(table: pd.DataFrame, title: str, caption: str) -> bytes:
    """A panel per task: scores on blocks held out, and on random splits pale, with their deviation.

    Args:
        table: Columns task, metric, embedder, random, random_std, blocked, blocked_std.
        title: Above the chart.
        caption: Below it.
    """
    tasks = list(table["task"].unique())
    figure, panels = _panels(len(tasks), title, caption)
    for axes, task in zip(panels, tasks, strict=True):
        rows = table[table["task"] == task]
        place = list(range(len(rows)))
        _line(axes, place, rows["random"], rows["random_std"], "#9db7c4", "random")
        _line(axes, place, rows["blocked"], rows["blocked_std"], ACCENT, "blocked")
        axes.set_xticks(place, rows["embedder"], rotation=30, ha="right", fontsize=8)
        axes.set_title(f"{task} ({rows['metric'].iloc[0]})", fontsize=10, color=INK, loc="left")
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper right", ncols=len(names[0]), frameon=False, fontsize=8)
    return png(figure)


def _panels(count: int, title: str, caption: str, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    rows = -(-count // COLUMNS)
    columns = -(-count // rows)
    figure = Figure(figsize=(max(6.0, 3.2 * columns), height * rows + 0.6), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", color=FAINT, fontsize=8)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, list(panels[:count])


def _line(axes: Axes, x: list[int], y: pd.Series, spread: pd.Series, colour: str, label: str) -> None:
    axes.errorbar(x, y, yerr=spread.fillna(0), color=colour, marker="o", ms=4, lw=1.6, capsize=3, label=label)
    plain(axes, "y")


def _colours() -> list[str]:
    return list(COLOURS) * 4


def _first_number(group: str) -> float:
    return float("".join(c if c in "-.0123456789" else " " for c in group).split()[0])
