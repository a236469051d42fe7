"""Fills the tables of docs/results.md from results/tables/, and draws its pictures: no number is copied by hand.

    python benchmarks/results_page.py

On the page, what stands between `<!-- NAME -->` and `<!-- end of NAME -->` is replaced by the table NAME of
`tables.py`; between those of `summary` by one line for each data set, and of `settings` by one line for each study.
The files have more: every run, its curve, scores of texts, the loss on unrelated texts.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import read_json, table
from scipy import stats
from tables import STUDIES

sys.path.insert(0, str(Path(__file__).parents[1]))

from loraplus_jax._utils.atomic import write_text
from loraplus_jax.sweep.statistics import t_interval
from loraplus_jax.training.metrics_log import pyplot, save_figure

DOCS = Path(__file__).parents[1] / "docs"
Report = Mapping[str, Any]
"""A study of a table, or a part of it."""
MIN_POINTS = 4
"""Evaluations after the first step that a curve needs for its steps to be counted: it is straight between them."""
RECOMMENDED = "lambda_64"
"""The λ with which the documentation starts with A zero."""
LINES = {
    "lora": ("LoRA", "#555555"),
    "lora_plus": ("LoRA+", "#0b5fa5"),
    "full": ("full fine-tuning", "#b5651d"),
}
"""Methods in the pictures, with their names and colors."""
THREE = 1 - 0.05 / 3
"""Confidence of each of three intervals that hold together with 95 %."""


def read() -> dict[str, dict[str, Report]]:
    """The studies of each table."""
    return {name: read_json(f"tables/{name}.json")["studies"] for name in STUDIES}


def number(value: float) -> str:
    """A number with four decimals."""
    return f"{value:.4f}".replace("-", "−")


def interval(estimate: Mapping[str, Any] | None, form: str) -> str:
    """A mean and its interval, or a dash."""
    if estimate is None or estimate["low"] is None:
        return "–"
    mean, low, high = (format(estimate[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def counts_steps(report: Report) -> bool:
    """Whether a study's curves have enough points to count steps on them."""
    runs = [run for method in report["methods"].values() for run in method["runs"] if not run["diverged"]]
    return all(len(run["curve"]) > MIN_POINTS for run in runs)


def significant(estimate: Mapping[str, Any] | None, form: str, equal: float = 0.0) -> str:
    """A mean and its interval, bold if the interval excludes the value of equal methods; or a dash."""
    text = interval(estimate, form)
    if estimate is None or text == "–" or estimate["low"] <= equal <= estimate["high"]:
        return text
    return f"**{text}**"


def method_row(title: str, report: Report, method: Report, named: bool) -> dict[str, str]:
    """A method's line of a study; `named` gives its score the name of the metric."""
    chosen, against, metric = method["chosen"], method["against_lora"], report["protocol"]["metric"]
    star = {name: "*" if name in method["at_the_edge"] else "" for name in ("learning_rate", "lr_ratio")}
    score = "score" if named else metric
    steps = against["steps_ratio"] if against and counts_steps(report) else None
    return {
        "data": title,
        "method": method["label"],
        "η_A": f"{chosen['learning_rate']:g}{star['learning_rate']}",
        "λ": f"{chosen['lr_ratio']:g}{star['lr_ratio']}",
        score: f"{metric} " * named + number(method["metric"]),
        f"{score} − LoRA's": significant(against and against["test_metric"], "+.4f"),
        "test loss": number(method["loss"]),
        "loss − LoRA's": significant(against and against["test_loss"], "+.4f"),
        "speedup in steps": significant(steps, ".2f", 1.0),
    }


def study_lines(studies: Mapping[str, Report]) -> list[str]:
    """The table of a section: a line for each method of each of its studies, named in the first of its lines."""
    named = len({report["protocol"]["metric"] for report in studies.values()}) > 1
    rows = [
        method_row("" if n else title, report, method, named)
        for title, report in studies.items()
        for n, method in enumerate(report["methods"].values())
    ]
    return [table(rows)]


def settings_lines(tables: Mapping[str, Mapping[str, Report]]) -> list[str]:
    """How each study was run, and its levels without training: one table for the page."""
    rows = []
    for name, studies in tables.items():
        for title, report in studies.items():
            p = report["protocol"]
            size, length = p["batch"]
            # Some tried more than others, where `sweep.widen` added rates.
            counts = sorted({method["settings"] for method in report["methods"].values()})
            levels = {"constant answer": p["constant"], "before training": p.get("untrained", {})}
            rows.append(
                {
                    "table": name,
                    "data": title,
                    "model": p["model"] + (", bfloat16" if p["dtype"] == "bfloat16" else ""),
                    "steps": f"{p['steps']:,}",
                    "rows × tokens": f"{size} × {length}",
                    "settings": " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))),
                    "report seeds": str(len(p["report_seeds"])),
                    "test examples": f"{p['test_rows']:,}",
                    "intervals, %": f"{100 * p['confidence']:.1f}",
                    # The first studies did not measure the level before training.
                    **{level: level_cell(values, p["metric"]) for level, values in levels.items()},
                    "hours": f"{p['hours']:.1f}",
                }
            )
    return [table(rows)]


def level_cell(values: Mapping[str, float], metric: str) -> str:
    """A score and a loss without training, or a dash."""
    return ", ".join(f"{name} {number(values[name])}" for name in (metric, "loss") if name in values) or "–"


def best_batch_line(studies: Mapping[str, Report]) -> str:
    """LoRA+ against LoRA, each at the number of rows that its own search chose."""
    best = {}
    for report in studies.values():
        for name in ("lora", "lora_plus"):
            method, size = report["methods"][name], report["protocol"]["batch"][0]
            if name not in best or lowest(method) < best[name][0]:
                best[name] = lowest(method), size, {run["seed"]: run["test"] for run in method["runs"]}
    (_, lora_rows, lora), (_, own_rows, own) = best["lora"], best["lora_plus"]
    difference = t_interval([own[seed]["loss"] - lora[seed]["loss"] for seed in lora], 0.95)
    return (
        f"Each at its own best number of rows by validation loss, LoRA {lora_rows} and LoRA+ {own_rows}: test loss "
        f"of LoRA+ minus LoRA's {interval(difference, '+.4f')} ({difference['pairs']} paired seeds)."
    )


def beats_constant(report: Report) -> bool | None:
    """Whether a method is significantly better than the constant answer; None where no such answer is known."""
    estimates = [method["over_constant"] for method in report["methods"].values()]
    return any(estimate["low"] > 0 for estimate in estimates) if all(estimates) else None


def start_lines(studies: Mapping[str, Report]) -> list[str]:
    """Both starts of a data set: LoRA's test loss with B zero, and with A zero those of three λ."""
    lines = []
    for data in dict.fromkeys(title.partition(", ")[0] for title in studies):
        a_zero, b_zero = (studies[f"{data}, {start}"]["methods"] for start in ("A zero", "B zero"))
        best = min(a_zero, key=lambda name: lowest(a_zero[name]))
        lora, *others = (
            {run["seed"]: run["test"]["loss"] for run in method["runs"]}
            for method in (b_zero["lora"], a_zero["lora"], a_zero[RECOMMENDED], a_zero[best])
        )
        one, fixed, chosen = (
            interval(t_interval([other[seed] - lora[seed] for seed in lora], THREE), "+.4f")
            for other in others
        )
        lines.append(
            f"- {data}: {one} for λ = 1, {fixed} for {a_zero[RECOMMENDED]['label']}, and {chosen} for "
            f"{a_zero[best]['label']}, which has the lowest validation loss ({len(lora)} paired seeds, "
            f"intervals of {100 * THREE:.1f} % each)."
        )
    return lines


def lowest(method: Report) -> float:
    """The lowest validation loss of a method's search."""
    return min(row["loss"] for row in method["search"])


def relative_loss(report: Report, name: str) -> dict[str, float]:
    """A method's difference in test loss to LoRA, in percent of LoRA's."""
    scale, loss = (
        100 / report["methods"]["lora"]["loss"],
        report["methods"][name]["against_lora"]["test_loss"],
    )
    return {end: loss[end] * scale for end in ("mean", "low", "high")}


def overall(
    data_sets: Sequence[Sequence[Report]], measure: str, confidence: float = THREE
) -> dict[str, float]:
    """Mean over data sets of LoRA+ against LoRA: of the `test_metric`, or geometric of the `steps_ratio`.

    A data set with several studies counts with their mean. Variances of independent means add; degrees of freedom
    by Welch and Satterthwaite: with 3 and 5 seeds, intervals of 95 % cover 93 to 96 %.
    """
    to, back = (np.log, np.exp) if measure == "steps_ratio" else (float, float)
    studies = [report for reports in data_sets for report in reports]
    shares = np.array([1 / len(data_sets) / len(reports) for reports in data_sets for _ in reports])
    found = [report["methods"]["lora_plus"]["against_lora"][measure] for report in studies]
    confidences = [report["protocol"]["confidence"] for report in studies]
    freedom = np.array([estimate["pairs"] - 1 for estimate in found])
    halves = np.array([to(estimate["high"]) - to(estimate["low"]) for estimate in found]) / 2
    variances = (shares * halves / half_width(confidences, freedom)) ** 2
    variance = variances.sum()
    degrees = variance**2 / (variances**2 / freedom).sum() if variance else 1
    mean = shares @ [to(estimate["mean"]) for estimate in found]
    half = half_width(confidence, degrees) * variance**0.5
    ends = {"mean": mean, "low": mean - half, "high": mean + half}
    return {name: float(back(end)) for name, end in ends.items()}


def half_width(confidence: Any, degrees: Any) -> Any:
    """Of a two-sided t-interval, in standard errors."""
    return stats.t.ppf((1 + np.asarray(confidence)) / 2, degrees)


def data_sets(tables: Mapping[str, Mapping[str, Report]]) -> dict[str, Report]:
    """LoRA+ against LoRA on each data set, in its first table: in a second one it would count twice."""
    again = ("repeat", "batch")  # of data that another table has
    found: dict[str, Report] = {}
    for name, studies in tables.items():
        for title, report in studies.items():
            if name not in again and "lora_plus" in report["methods"]:
                found.setdefault(title, report)
    return found


def summary_lines(tables: Mapping[str, Mapping[str, Report]]) -> list[str]:
    """One line a data set, LoRA+ against LoRA, and means over those above the constant answer."""
    rows, kept = [], []
    for title, report in data_sets(tables).items():
        above, against = beats_constant(report), report["methods"]["lora_plus"]["against_lora"]
        steps = against["steps_ratio"] if counts_steps(report) else None
        if above:
            again = [r for t, r in tables["repeat"].items() if t.startswith(f"{title}, seeds")]
            kept.append([report, *again])
        rows.append(
            {
                "data": title,
                "steps": f"{report['protocol']['steps']:,}",
                "metric": report["protocol"]["metric"],
                "LoRA": number(report["methods"]["lora"]["metric"]),
                "difference in metric": significant(against["test_metric"], "+.4f"),
                "difference in loss, %": significant(relative_loss(report, "lora_plus"), "+.2f"),
                "speedup in steps": significant(steps, ".2f", 1.0),
                "above the constant answer": {True: "yes", False: "no", None: "–"}[above],
            }
        )
    counted = [reports for reports in kept if all(map(counts_steps, reports))]
    twice = [reports[0]["protocol"]["data"] for reports in kept if len(reports) > 1]
    gain, first = (overall(sets, "test_metric") for sets in (kept, [reports[:1] for reports in kept]))
    return [
        table(rows),
        f"Mean over the {len(kept)} data sets above the constant answer, with {' and '.join(twice)} [on other "
        f"seeds](#on-other-seeds) too: gain in the metric {interval(gain, '+.4f')}, without these repetitions "
        f"{interval(first, '+.4f')}; speedup in steps, on {len(counted)} of them, "
        f"{interval(overall(counted, 'steps_ratio'), '.2f')}. Intervals of {100 * THREE:.1f} % each.",
    ]


def panels_for(count: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """A figure with so many panels, two in a row, and their axes; width and height of one in inches."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, panels = pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return figure, panels.flat[:count]


def draw_curves(tables: Mapping[str, Mapping[str, Report]], path: Path) -> None:
    """The test loss over the steps, a panel a data set: the mean of the seeds, and their lowest and highest.

    Only of data sets above the constant answer, whose curves have enough points to count steps.
    """
    studies = {
        t: r for t, r in data_sets(tables).items() if beats_constant(r) is not False and counts_steps(r)
    }
    figure, panels = panels_for(len(studies), 4.5, 3.5)
    for axes, (title, report) in zip(panels, studies.items(), strict=True):
        for name, (label, color) in LINES.items():
            if name not in report["methods"]:
                continue
            curves = np.array([run["curve"] for run in report["methods"][name]["runs"]])
            steps, losses = curves[0, 1:, 0], curves[:, 1:, 1]
            axes.plot(steps, losses.mean(0), ".-", color=color, label=label)
            axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel="test loss", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    save_figure(figure, path)


def draw(tables: Mapping[str, Mapping[str, Report]], path: Path) -> None:
    """The difference in test loss to LoRA with its interval, in percent: data sets and their repetitions."""
    first = data_sets(tables)
    again = {title: report for title, report in tables["repeat"].items() if "A zero" not in title}
    # A data set's repetitions follow it.
    pairs = ((title, name) for title in first for name in first | again if name.split(", seeds")[0] == title)
    shown = {name: (first | again)[name] for _, name in pairs}
    figure, axes = pyplot().subplots(figsize=(8, 1.2 + 0.4 * len(shown)), layout="constrained")
    for name, marker, shift in (("lora_plus", "o", 0.12), ("full", "s", -0.12)):
        label, color = LINES[name]
        for row, report in enumerate(shown.values()):
            if name not in report["methods"]:
                continue
            found = relative_loss(report, name)
            axes.hlines(shift - row, found["low"], found["high"], color=color, linewidth=2)
            axes.plot(found["mean"], shift - row, marker, color=color)
        axes.plot([], [], marker, color=color, label=label)
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    titles = [title + " (not learned)" * (beats_constant(report) is False) for title, report in shown.items()]
    axes.set_yticks([-row for row in range(len(shown))], titles)
    axes.set(xlabel="test loss relative to tuned LoRA's (%), lower is better")
    axes.set_xscale("symlog", linthresh=1)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    save_figure(figure, path)


def map_points(report: Report) -> list[tuple[float, float, float]]:
    """(η_A, η_B, mean validation loss over the seeds) of each setting that trained to the end."""
    losses: dict[tuple[float, float], list[float]] = {}
    for method in report["methods"].values():
        for row in method["search"]:
            if row["step"] == report["protocol"]["steps"]:
                rate = row["learning_rate"]
                losses.setdefault((rate, rate * row["lr_ratio"]), []).append(row["loss"])
    return [(*rates, sum(x) / len(x)) for rates, x in losses.items()]


def draw_ratios(studies: Mapping[str, Report], path: Path) -> None:
    """The difference in test loss to λ = 1 over λ with its interval, a panel a data set and a line a start."""
    panels = list(dict.fromkeys(title.partition(", ")[0] for title in studies))
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(1 + 4.5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for title, report in studies.items():
        data, _, start = title.partition(", ")
        panel, points = axes[0, panels.index(data)], [(1.0, 0.0, 0.0, 0.0)]
        for name, method in report["methods"].items():
            if name != "lora":
                points.append((method["chosen"]["lr_ratio"], *relative_loss(report, name).values()))
        ratios, means, lows, highs = np.transpose(sorted(points))
        # Side by side, where the intervals of two starts would cover each other.
        ratios *= 1.04 ** len(panel.containers)
        panel.errorbar(ratios, means, [means - lows, highs - means], fmt="o-", capsize=3, label=start)
        panel.legend(frameon=False)
    for panel, data in zip(axes.flat, panels, strict=True):
        panel.axhline(0, color="black", linewidth=1, linestyle="--", zorder=0)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(xlabel="λ, each at its own best η_A", title=data)
        panel.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("test loss relative to λ = 1 of the same start (%)")
    save_figure(figure, path)


def draw_maps(studies: Mapping[str, Report], path: Path) -> None:
    """The validation loss over (η_A, η_B), a panel a study; the line is plain LoRA, the frame the lowest loss."""
    figure, panels = panels_for(len(studies), 5, 4.2)
    # One scale of colors a data set. Of the upper half of the losses, which may be far above, the colors need not
    # tell one from another.
    losses: dict[str, list[float]] = {}
    for title, report in studies.items():
        losses.setdefault(title.partition(", ")[0], []).extend(point[2] for point in map_points(report))
    for axes, (title, report) in zip(panels, studies.items(), strict=True):
        points = map_points(report)
        best, scale = min(points, key=lambda point: point[2]), sorted(losses[title.partition(", ")[0]])
        rates, others, colors = np.transpose(points)
        limits = {"vmin": scale[0], "vmax": scale[len(scale) // 2]}
        shown = axes.scatter(rates, others, c=colors, cmap="viridis_r", marker="s", s=150, **limits)
        figure.colorbar(shown, ax=axes, label="validation loss", extend="max")
        axes.plot(
            *best[:2], "s", markersize=16, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2
        )
        farthest = {f"{other / rate:.3g}": (rate, other) for rate, other, _ in sorted(points)}
        for ratio, end in farthest.items():
            axes.annotate(f"λ = {ratio}", end, (8, 5), textcoords="offset points", fontsize=8)
        axes.margins(0.2)
        ends = [rate for rate, other, _ in sorted(points) if rate == other]
        axes.plot(ends, ends, "--", color="black", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="η_A", ylabel="η_B", title=title)
    save_figure(figure, path)


def overhead_lines() -> list[str]:
    """What a step of each method costs, from `overhead.py`."""
    content = read_json("tables/overhead.json")
    methods = {row["method"]: row for row in content["rows"]}
    lora, own = methods["lora"], methods["lora_plus"]
    ratios = {n: own[n] / lora[n] for n in ("flops", "peak_bytes", "optimizer_bytes")}
    rows = [
        {
            "method": name,
            "trained": f"{row['trainable']:,}",
            "optimizer state, MB": f"{row['optimizer_bytes'] / 1e6:.2f}",
            "memory of a step, MB": f"{row['peak_bytes'] / 1e6:.1f}",
            "GFLOP": f"{row['flops'] / 1e9:.4f}",
            **{f"{part}, ms": f"{1e3 * row[part]:.0f}" for part in ("forward", "backward")},
            "optimizer step, ms": f"{1e3 * row['optimizer']:.2f}",
            "step / LoRA's": f"{row['step_over_lora']:.3f}",
        }
        for name, row in methods.items()
    ]
    (size, length), ran_on = content["batch"], content["machine"]
    cores = f"{ran_on['processor']} {ran_on['cores']} cores"
    return [
        f"**Result.** LoRA+ needs {ratios['flops']:.4f} × LoRA's FLOPs, {ratios['peak_bytes']:.4f} × its memory "
        f"and {ratios['optimizer_bytes']:.4f} × its optimizer state. A step takes {own['step_over_lora']:.3f} × "
        f"the time, its optimizer {own['optimizer_over_lora']:.3f} × (medians of {content['rounds']} rounds).",
        f"MiniLM's shape, {size} × {length} tokens, rank {content['rank']} on query and value, {cores}. Memory is "
        "the compiler's: arguments and temporaries. Backward is the gradient's time less the forward pass.",
        table(rows),
    ]


def filled(page: str, tables: Mapping[str, Mapping[str, Report]]) -> str:
    """The page with every block filled."""
    cola = tables["glue"]["CoLA"]
    pair = {name: cola["methods"][name] for name in ("lora", "lora_plus")}
    batch = {"CoLA, 32 rows": {**cola, "methods": pair}, **tables["batch"]}
    batch = dict(sorted(batch.items(), key=lambda item: item[1]["protocol"]["batch"][0]))
    blocks = {
        "summary": summary_lines(tables),
        "overhead": overhead_lines(),
        "settings": settings_lines(tables),
        **{name: study_lines(studies) for name, studies in (tables | {"batch": batch}).items()},
    }
    blocks["lambda"].append("\n".join(start_lines(tables["lambda"])))
    blocks["batch"].append(best_batch_line(batch))
    for name, lines in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = "\n\n".join([start, *lines, end])
        page, count = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: text, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(
                f"docs/results.md has {count} blocks of {name}, from {start} to {end}; it needs one"
            )
    return page


def main() -> None:
    path, tables = DOCS / "results.md", read()
    write_text(path, filled(path.read_text(encoding="utf-8"), tables))
    draw(tables, DOCS / "results" / "differences.png")
    draw_curves(tables, DOCS / "results" / "convergence.png")
    draw_ratios(tables["lambda"], DOCS / "results" / "lambda.png")
    draw_maps(tables["lambda"], DOCS / "results" / "lambda_map.png")


if __name__ == "__main__":
    main()
