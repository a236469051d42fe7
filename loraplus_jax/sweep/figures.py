"""Figures of a sweep's report, drawn from `report.json` alone; line styles and markers work without colour."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..training.metrics_log import pyplot, save_figure
from .trial import ARM_LABELS

PICTURES = {
    "heat_map": "Validation loss over the learning rates of A and B at the last comparison. Dashed line: plain "
    "LoRA (equal rates). Frame: selected setting. Cross: diverged. Grey: dropped after the number of steps shown.",
    "differences": "Test loss minus tuned LoRA's, paired by seed: mean and interval. Left of the line is better.",
    "curves": "Test loss of the selected settings: mean over the report seeds; a band spans minimum to maximum.",
}
"""Name and caption of each figure."""
MOST_BANDS = 3
"""Curves that may have bands; more would hide each other."""
COLOURS = {"lora": "#b04a00", "lora_plus": "#0b5fa5", "control": "#3f3f3f"}
MARKERS = {"lora": "s", "lora_plus": "o", "control": "^"}
LINES: dict[str, Any] = {"lora": "--", "lora_plus": "-", "control": ":"}
Report = Mapping[str, Any]


def pictures_of(report: Report) -> list[str]:
    """The figures of a complete report: a sweep of lambda has the map of rates, one of methods the differences."""
    is_of_lambda = report["decision"] is not None
    return [name for name in PICTURES if name != ("differences" if is_of_lambda else "heat_map")]


def draw_figures(directory: Path, report: Report, names: Iterable[str] | None = None) -> None:
    """Draws figures of a report as PNG files in `directory`; an incomplete report has only `"heat_map"`."""
    plt = pyplot()
    drawings = {"heat_map": heat_map, "differences": draw_differences, "curves": draw_curves}
    for name in pictures_of(report) if names is None else names:
        drawing = drawings[name]
        figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
        drawing(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
        save_figure(figure, directory / f"{name}.png")


def heat_map(axes: Any, report: Report) -> None:
    """Loss over (eta_A, eta_B) at the last comparison; settings dropped earlier show the step of their last one."""
    from matplotlib import ticker  # slow to import, and only pictures need it

    last = last_step(report["search"])
    cells, dropped = heat_map_cells(report["search"])
    finite = {point: loss for point, loss in cells.items() if loss is not None and point not in dropped}
    diverged = [point for point, loss in cells.items() if loss is None and point not in dropped]
    points, losses = np.array(list(finite)), np.array(list(finite.values()))
    rates = np.array(list(cells))
    limits = np.array([rates.min() / 1.6, rates.max() * 1.6])
    axes.plot(limits, limits, "--", color="black", linewidth=1, zorder=1)
    # Markers have a size in points, not in data units, so it follows the number of cells.
    size = 1400 / max(1.0, len(cells) / 8)
    color_max = min(losses.max(), 2 * np.median(losses))  # one outlier must not wash out all other colours
    squares = axes.scatter(
        *points.T,
        c=losses,
        s=size,
        marker="s",
        cmap="viridis_r",
        vmax=color_max,
        edgecolors="white",
        zorder=2,
    )
    midpoint = (losses.min() + color_max) / 2
    for (x, y), loss in zip(points, losses, strict=True):
        colour = "black" if loss < midpoint else "white"
        axes.annotate(
            f"{loss:.3f}".removeprefix("0") if loss < 100 else f"{loss:.0e}",
            (x, y),
            ha="center",
            va="center",
            fontsize=7 if len(cells) <= 16 else 6.5,
            color=colour,
            zorder=3,
        )
    if dropped:
        grey = {"marker": "s", "color": "0.85", "edgecolors": "white", "zorder": 2}
        axes.scatter(*np.array(list(dropped)).T, s=size, label="dropped after this many steps", **grey)
    for point, step in dropped.items():
        axes.annotate(f"{step}", point, ha="center", va="center", fontsize=7, color="0.4", zorder=3)
    if diverged:
        axes.scatter(*np.array(diverged).T, s=90, marker="x", color="black", zorder=3, label="diverged")
    for arm, best in report["chosen"].items():
        point = best["learning_rate"], best["learning_rate"] * best["lr_ratio"]
        style = {"facecolors": "none", "edgecolors": COLOURS[arm], "linewidths": 3, "linestyle": LINES[arm]}
        axes.scatter(
            *point, s=1.3 * size, marker="s", zorder=4, label=f"{ARM_LABELS[arm]}, selected", **style
        )
    if axes.get_legend_handles_labels()[0]:
        # Outside the axes, where it covers no cell; with room for its markers, which are large if cells are few.
        axes.figure.legend(
            frameon=False, loc="outside lower center", ncols=2, fontsize=9, markerscale=0.5, labelspacing=1.5
        )
    axes.annotate(
        "dashed: plain LoRA, equal rates", (0.98, 0.03), xycoords="axes fraction", ha="right", fontsize=9
    )
    axes.set(
        xscale="log", yscale="log", xlabel="learning rate of A", ylabel="learning rate of B", ylim=limits
    )
    axes.set_title(f"Validation loss after {last} of {report['protocol']['steps']} steps")
    axes.set_xlim(rates[:, 0].min() / 1.6, rates[:, 0].max() * 1.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(axis="x", rotation=30)
    axes.figure.colorbar(squares, label="validation loss")


Point = tuple[float, float]


def last_step(rows: Sequence[Mapping[str, Any]]) -> int:
    """The latest step with a finite loss."""
    return max(row["step"] for row in rows if row["loss"] is not None)


def heat_map_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[Point, float | None], dict[Point, int]]:
    """Maps (eta_A, eta_B) to the lowest loss over alphas and ranks at the last step, and dropped cells to steps.

    The loss is None where a cell has no finite loss at the last step.

    >>> row = {"learning_rate": 1.0, "step": 5, "loss": 0.5}
    >>> heat_map_cells([row | {"lr_ratio": 2.0}, row | {"lr_ratio": 1.0}, row | {"lr_ratio": 2.0, "step": 9}])
    ({(1.0, 2.0): 0.5, (1.0, 1.0): None}, {(1.0, 1.0): 5})
    """
    last = last_step(rows)
    cells: dict[Point, float | None] = {}
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}  # the latest row of each setting
    for row in rows:
        cell = (row["learning_rate"], row["learning_rate"] * row["lr_ratio"])
        losses = [cells.get(cell), row["loss"] if row["step"] == last else None]
        cells[cell] = min((loss for loss in losses if loss is not None), default=None)
        setting = (cell, row.get("alpha"), row.get("rank"))
        latest[setting] = max(row, latest.get(setting, row), key=lambda row: row["step"])
    dropped: dict[Point, int] = {}
    for (cell, *_), row in latest.items():
        if row["loss"] is not None and cells[cell] is None:
            dropped[cell] = max(row["step"], dropped.get(cell, 0))
    return cells, dropped


def draw_differences(axes: Any, report: Report) -> None:
    """Each method's test loss minus LoRA's: mean and interval, the lowest on top."""
    found = {row["first"]: row["test_loss"] for row in report["comparisons"]}
    found = {name: interval for name, interval in found.items() if interval["low"] is not None}
    names = sorted(found, key=lambda name: -found[name]["mean"])
    for place, name in enumerate(names):
        interval = found[name]
        axes.hlines(place, interval["low"], interval["high"], color=COLOURS["lora_plus"], linewidth=2)
        axes.plot(interval["mean"], place, "o", color=COLOURS["lora_plus"], markersize=7)
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), [report["methods"][name]["label"] for name in names])
    axes.set(xlabel="test loss minus tuned LoRA's", title="Difference to tuned LoRA, paired by seed")
    axes.grid(axis="x", alpha=0.3)


def draw_curves(axes: Any, report: Report) -> None:
    """Mean curve and min-max band of each arm, over its runs that did not diverge."""
    arms = list(dict.fromkeys(run["arm"] for run in report["runs"]))
    for number, arm in enumerate(arms):
        runs = [run["curve"] for run in report["runs"] if run["arm"] == arm and not run["diverged"]]
        if not runs:
            continue
        steps, losses = [step for step, _ in runs[0]], np.array([[loss for _, loss in run] for run in runs])
        color = COLOURS.get(arm, f"C{number % 10}")
        if len(arms) <= MOST_BANDS:
            axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.18, linewidth=0)
        style = {
            "color": color,
            "linestyle": LINES.get(arm, ["-", "--", "-.", ":"][number // 10 % 4]),
            "marker": MARKERS.get(arm),
            "markersize": 4,
        }
        axes.plot(steps, losses.mean(0), label=arm_label(arm, report), **style)
    axes.set(xlabel="step", ylabel="test loss", title="Selected settings on the report seeds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=None if len(arms) <= MOST_BANDS else 8)


def arm_label(arm: str, report: Report) -> str:
    """Label of an arm with its selected setting."""
    label, chosen = (
        report["methods"][arm]["label"],
        report["chosen"]["lora_plus" if arm == "control" else arm],
    )
    rate = f"lr {chosen['learning_rate']:g}"
    if arm == "control":
        return f"{label}\n{rate}, alpha {chosen['alpha'] * chosen['lr_ratio']:g}"
    return f"{label}, {rate}" + (f", lambda {chosen['lr_ratio']:g}" if chosen["lr_ratio"] != 1 else "")
