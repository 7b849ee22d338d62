"""Draws charts of training and of scores: loss, probes, geographic bias, ablations."""

import re
from calendar import month_abbr
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tasks.core.field import kernel_width_km
from tasks.core.paired import MARKS
from tasks.plots.style import ACCENT, FAINT, INK, SECOND, canvas, plain, png

PRODUCTS = ("multi-head", "grid")  # beginnings of the names of what is published, drawn in the second colour
COLOURS = (ACCENT, SECOND, "#6a8f3c", "#8a5fa8", "#b8912b", "#4a6fa5", "#b5524b", "#5c9a94")
COLUMNS = 5  # most panels in a row
WRAP = 14  # letters of a line of a panel's title
LABELS = {"loss": "InfoNCE loss", "accuracy": "held-out recall@1 %"}
LABELS |= {"one_out": "one image left out", "block_out": "10-degree blocks left out"}
TRIED = {"nearest": "reach: to which nearest image"}  # of a kind of head, what else than a temperature was tried
PALE = LinearSegmentedColormap.from_list("pale", ["#f3e3d8", "#dfe9ee", "#6fa9c2"])  # so that what is written is read
LEAST_SHARE = -0.5  # of the variance restored that is drawn: a head may be worse than the mean


def bias_chart(failures: pd.DataFrame, title: str, caption: str) -> bytes:
    """Draws scores by continent, latitude and distance, with a line per task and standard errors; returns a PNG.

    Args:
        failures: Scores by group, from `where_it_fails`.
        title: Text above the chart.
        caption: Text below the chart.
    """
    kinds = list(failures["by"].unique())
    figure, panels = _panels(len(kinds), title, caption, height=4.4)
    for axes, by in zip(panels, kinds, strict=True):
        part = failures[failures["by"] == by]
        if by == "continent":
            groups = list(part["group"].unique())
        else:
            groups = sorted(part["group"].unique(), key=_first_number)
        for colour, (task, rows) in zip(_colours(), part.groupby("task", sort=False), strict=False):
            _line(axes, [groups.index(g) for g in rows["group"]], rows["score"], rows["std"], colour, str(task))
        axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
        axes.set_title(by, fontsize=10, color=INK, loc="left")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    return png(figure)


def ablation_chart(table: pd.DataFrame, title: str, caption: str) -> bytes:
    """Draws a panel per task: scores on held-out blocks, and pale on random splits, with deviations; returns a PNG.

    Args:
        table: Columns task, metric, embedder, random, random_std, blocked, blocked_std.
        title: Text above the chart.
        caption: Text below the chart.
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
    return float(re.findall(r"[-.0-9]+", group)[0])


def loss_curve(histories: Sequence[Sequence[Mapping[str, Any]]], title: str, caption: str) -> bytes:
    """Draws loss and held-out recall by step, with a line for each training; returns a PNG."""
    figure, axes = canvas(9, 4.8, title, caption)
    axes.set_axis_on()
    axes.set_aspect("auto")
    for name, colour, axis in (("loss", ACCENT, axes), ("accuracy", SECOND, axes.twinx())):
        for history in histories:
            axis.plot([e["step"] for e in history], [e[name] for e in history], color=colour, lw=2)
        axis.set_ylabel(LABELS[name], color=colour)
        axis.tick_params(colors=FAINT)
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
    axes.set_xlabel("step", color=INK)
    return png(figure)


def kernel_chart(heads: Sequence[Mapping[str, Any]], title: str, caption: str) -> bytes:
    """Draws how well heads restore images that were left out, a panel for each kind of head; returns a PNG.

    Args:
        heads: Curves as a database's card has them: `kind`, what was tried in `at`, the shares of the variance that
            were restored in `one_out` and `block_out`, and `chosen`, such as `geodesic:1000`.
        title: Text above the chart.
        caption: Text below the chart.
    """
    figure, panels = _panels(len(heads), title, caption, height=3.8)
    for axes, head in zip(panels, heads, strict=True):
        for name, colour in (("one_out", ACCENT), ("block_out", SECOND)):
            axes.plot(head["at"], head[name], color=colour, marker="o", ms=4, lw=1.8, label=LABELS[name])
        axes.set_xscale("log")
        axes.set_xticks(head["at"][::2], [f"{at:,.10g}" for at in head["at"][::2]])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(TRIED.get(head["kind"], "temperature"), color=INK, fontsize=9)
        axes.set_title(head["kind"], fontsize=10, color=INK, loc="left")
        axes.tick_params(colors=FAINT, which="both", length=0, labelsize=8)
        plain(axes, "y")
        _mark_chosen(axes, float(head["chosen"].rpartition(":")[2]), head["kind"])
    low = min(min(head["one_out"] + head["block_out"]) for head in heads)
    for axes in panels:
        axes.set_ylim(min(0.0, max(low, LEAST_SHARE)), 1)
    panels[0].set_ylabel("share of the variance restored", color=INK, fontsize=9)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return png(figure)


def _mark_chosen(axes: Axes, at: float, kind: str) -> None:
    axes.axvline(at, color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    width = f", {kernel_width_km(at):,.0f} km wide" if kind == "geodesic" else ""
    axes.set_title(f"chosen: {at:g}{width}", fontsize=8, color=FAINT, loc="right")


def calendar_chart(values: pd.Series, marks: pd.Series, title: str, caption: str) -> bytes:
    """Draws one number a month as a calendar, a row for each year; returns a PNG.

    Args:
        values: By month, such as `2021-06`; 0 is none.
        marks: Shares of the same months, written into them in percent; a share of 0 is not.
        title: Text above the chart.
        caption: Text below the chart.
    """
    years = sorted({month[:4] for month in values.index}) or [""]
    cells = np.full((len(years), 12), np.nan)
    figure, axes = canvas(9, max(2.4, 1.6 + 0.45 * len(years)), title, caption)
    axes.set_axis_on()
    for month, value, mark in zip(values.index, values, marks, strict=True):
        row, column = years.index(month[:4]), int(month[5:7]) - 1
        cells[row, column] = value
        if mark:
            axes.text(column, row, f"{mark:.0%}", ha="center", va="center", fontsize=8, color=INK)
    mesh = axes.imshow(cells, cmap=PALE, vmin=0, vmax=max(np.nan_to_num(cells).max(), 1e-9), aspect="auto")
    axes.set_xticks(range(12), [month_abbr[i + 1] for i in range(12)], fontsize=8)
    axes.set_yticks(range(len(years)), years, fontsize=8)
    axes.tick_params(colors=FAINT, length=0)
    figure.colorbar(mesh, ax=axes, pad=0.01).ax.tick_params(colors=FAINT, labelsize=8, length=0)
    plain(axes, "x")
    axes.grid(visible=False)
    return png(figure)


def score_chart(table: pd.DataFrame, title: str, caption: str) -> bytes:
    """Draws bars by task and embedder, pale for the random split, full for blocks with their deviation; returns a PNG.

    Args:
        table: Columns task, metric, embedder, random, blocked, and perhaps blocked_std and verdict, whose marks stand
            beside the bars; NaN where not scored.
        title: Text above the chart.
        caption: Text below the chart.
    """
    tasks, embedders = list(table["task"].unique()), list(table["embedder"].unique())
    height = 1.8 + 0.28 * max(10, len(embedders))
    figure = Figure(figsize=(12, height), facecolor="white")
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=15, fontweight="bold")
    figure.text(0.02, 0.02, caption, color=FAINT, fontsize=8.5)
    panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
    for axes, task in zip(panels, tasks, strict=True):
        _score_bars(axes, table[table["task"] == task].set_index("embedder").loc[embedders], task)
    figure.subplots_adjust(left=0.13, right=0.985, top=1 - 0.92 / height, bottom=0.69 / height, wspace=0.14)
    return png(figure)


def _score_bars(axes: Axes, rows: pd.DataFrame, task: str) -> None:
    place = np.arange(len(rows))[::-1]
    axes.barh(place, rows["random"].clip(lower=0), color="#cfe0e8", height=0.74)
    colours = [SECOND if name.startswith(PRODUCTS) else ACCENT for name in rows.index]
    spread = rows.get("blocked_std")
    style = {"ecolor": INK, "elinewidth": 0.8}
    axes.barh(place, rows["blocked"].clip(lower=0), xerr=spread, color=colours, height=0.44, error_kw=style)
    ends = rows[["random", "blocked"]].max(axis=1).clip(lower=0)
    for y, end, verdict in zip(place, ends, rows.get("verdict", [""] * len(rows)), strict=True):
        axes.text(end + 0.05, y, MARKS.get(verdict, ""), fontsize=7, color=INK, va="center")
    for y in place[rows["blocked"].isna()]:
        axes.text(0.02, y, "weights not given", fontsize=7, color=FAINT, va="center")
    axes.set_title(f"{fill(task, WRAP)}\n({rows['metric'].iloc[0]})", fontsize=10, color=INK, loc="left")
    axes.set_yticks(place, rows.index, fontsize=9.5, color=INK)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.tick_params(axis="x", colors=FAINT, length=0, labelsize=8)
    axes.tick_params(axis="y", length=0)
    plain(axes, "x")
