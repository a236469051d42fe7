"""docs/results.md and its pictures, from the JSON files of `tables.py` alone: no number is copied by hand."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import table

from loraplus_jax._utils.atomic import write_text
from loraplus_jax.sweep.statistics import ratio_interval, steps_to, t_interval
from loraplus_jax.training.metrics_log import pyplot, save_figure

LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae")
MIN_POINTS = 4
"""Evaluations after the first step that a curve needs for its steps to be counted: it is straight between them."""
Found = Mapping[str, Any]
"""The content of a table's JSON file, or a part of it."""


class Section(NamedTuple):
    """A table's place on the page.

    Attributes:
      title: heading.
      claim: what the project's description says.
      paper: what the LoRA+ paper says.
      lines: Markdown of the measured numbers, with the verdict.
      draw: draws them on a figure.
      gain: the claimed gain in the metric, as a fraction of 1; None without one.
      steps: the claimed ratio of LoRA's steps over those of LoRA+; None without one.
    """

    title: str
    claim: str
    paper: str
    lines: Callable[[Found, "Section"], list[str]]
    draw: Callable[[Any, Found], None]
    gain: float | None = None
    steps: float | None = None


def write_page(results: Path, docs: Path) -> None:
    """Writes the page and a picture of each table that has been measured."""
    pictures = docs / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, found in read(results).items():
        figure = pyplot().figure(layout="constrained")
        SECTIONS[name].draw(figure, found)
        save_figure(figure, pictures / f"{name}.png")
    write_text(docs / "results.md", page(read(results)))


def read(results: Path) -> dict[str, Found]:
    """The tables that have been measured."""
    paths = {name: results / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


WITH_DATA = ("glue", "e2e", "commonsense", "methods")
"""The tables that need `--data`."""


def page(tables: Mapping[str, Found]) -> str:
    """The whole page, in Markdown."""
    text = [HEAD]
    for name, section in SECTIONS.items():
        text += [f"## {section.title}", f"**Claimed.** {section.claim}", f"**The paper.** {section.paper}"]
        command = f"`python benchmarks/tables.py {name}{' --data DATA' if name in WITH_DATA else ''}`"
        if name not in tables:
            text += [f"**Measured.** Not yet: {command}"]
            continue
        text += [f"**Measured** by {command}.", f"![{section.title}](results/{name}.png)"]
        text += section.lines(tables[name], section)
    return "\n\n".join(text) + "\n"


HEAD = """# Results: seven tables

This page lists what LoRA+ was measured to bring, beside what the project's description claims and what the paper
([arXiv 2402.12354](https://arxiv.org/abs/2402.12354)) says. `python benchmarks/tables.py page` writes it from
`benchmarks/results/tables/`.

The description's numbers are of models of up to 7 billion weights and come without a source: the paper has heat
maps and no such tables. Here the models are those that two CPU cores can train: MiniLM (22.7 M weights) and
SmolLM2-135M, on real data, for few steps. So compare the differences between methods, not the levels.

All tables were measured with `lora.init: he_uniform`, whose A is √6 times as large at the start as that of the
default, `lora`. [Choosing λ](choosing_lambda.md#from-one-start-to-the-other) says how rates carry over.

In all tables every method is tuned on as many settings, by validation loss, and compared with LoRA tuned alike, on
other seeds and the test split. Differences are paired by seed. η_A is A's learning rate, λ is B's over A's. "LoRA's
steps / its own" counts the steps to the worse of the two final losses; above 1 the method is faster. A dash means
that the curves have fewer than four evaluations after the first step, too few to count steps on. A star marks a
best value at the edge of the search range. In a verdict, a positive gain means that LoRA+ is better, also where
lower values are. [How a sweep compares methods](comparing_methods.md) has the rules."""


# Numbers as text.


def interval(estimate: Found | None, form: str) -> str:
    """A mean and its interval, or a dash."""
    if estimate is None or estimate["low"] is None:
        return "–"
    mean, low, high = (format(estimate[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def judge(what: str, estimate: Found, form: str, claimed: float | None, even: float, better: int = 1) -> str:
    """What an interval says of LoRA+ against LoRA, and of a claim.

    Args:
      what: name of the quantity.
      estimate: mean, low and high.
      form: format of the numbers.
      claimed: the claimed value.
      even: the value at which the methods are equal.
      better: 1 if LoRA+ is better above `even`, -1 if below.
    """
    if estimate["low"] is None:
        return f"{what}: no result."
    if estimate["low"] == estimate["high"] == even:
        return f"{what}: {format(even, form)}, the same on every seed."
    side = better * ((estimate["low"] > even) - (estimate["high"] < even))
    verdict = {
        1: "LoRA+ is significantly better",
        0: "no significant difference",
        -1: "LoRA+ is significantly worse",
    }
    text = f"{what}: {interval(estimate, form)}, {verdict[side]}."
    if claimed is not None:
        where = "inside" if estimate["low"] <= claimed <= estimate["high"] else "outside"
        text += f" The claimed {format(claimed, form)} is {where} the interval."
    return text


# Tables of tuned methods.


def pairs_of(report: Found, name: str) -> dict[int, tuple[float, float | None]]:
    """By seed: a method's gain in the metric over LoRA, and the ratio of LoRA's steps over its own.

    Steps are those to the worse of the two final losses; the ratio is None if that is where training began.
    """
    lora = {run["seed"]: run for run in report["methods"]["lora"]["runs"]}
    metric, found = report["protocol"]["metric"], {}
    for run in report["methods"][name]["runs"]:
        other = lora[run["seed"]]
        if run["diverged"] or other["diverged"]:
            continue
        gain = run["test"][metric] - other["test"][metric]
        own, its = run["steps_to_target"], steps_to(other["curve"], run["target"])
        at_start = other["curve"][0][1] <= run["target"]
        ratio = None if own is None or its is None or at_start else its / own
        found[run["seed"]] = -gain if metric in LOWER_IS_BETTER else gain, ratio
    return found


def counts_steps(report: Found) -> bool:
    """Whether a study's curves have enough points to count steps on them."""
    runs = [run for method in report["methods"].values() for run in method["runs"] if not run["diverged"]]
    return all(len(run["curve"]) > MIN_POINTS for run in runs)


def overall(studies: Sequence[Found], name: str) -> tuple[Found, Found]:
    """Gain in the metric and ratio of steps, each the mean over the studies, with an interval over the seeds.

    The intervals have the confidence of those in the tables.
    """
    confidence = max(report["protocol"]["confidence"] for report in studies)
    by_study = [pairs_of(report, name) for report in studies]
    seeds = sorted(set.intersection(*(set(pairs) for pairs in by_study)))
    gains = [float(np.mean([pairs[seed][0] for pairs in by_study])) for seed in seeds]
    rows = [[pairs[seed][1] for pairs in by_study] for seed in seeds]
    ratios = [statistics.geometric_mean(row) for row in rows if None not in row]
    return t_interval(gains, confidence), ratio_interval(ratios, [1.0] * len(ratios), confidence)


def budget(report: Found) -> str:
    """How a study was run."""
    p, machine = report["protocol"], report["machine"]
    size, length = p["batch"]
    return (
        f"{p['model']}, {p['steps']} steps of {size} × {length} tokens; {p['settings']} settings a method on "
        f"seed {', '.join(map(str, p['seeds']))}, reported on {len(p['report_seeds'])} other seeds and "
        f"{p['test_rows']:,} test examples. Intervals of {100 * p['confidence']:.1f} % each, so that all hold "
        f"together with 95 %. {machine['cores']} cores ({machine['device']})."
    )


def method_row(report: Found, method: Found) -> dict[str, str]:
    """A method's line of a study."""
    chosen, against, metric = method["chosen"], method["against_lora"], report["protocol"]["metric"]
    star = {name: "*" if name in method["at_the_edge"] else "" for name in ("learning_rate", "lr_ratio")}
    row = {
        "method": method["label"],
        "η_A": f"{chosen['learning_rate']:g}{star['learning_rate']}" if chosen else "–",
        "λ": f"{chosen['lr_ratio']:g}{star['lr_ratio']}" if chosen else "–",
        metric: number(method["metric"]),
        f"{metric} − LoRA's": interval(against and against["test_metric"], "+.4f"),
        "test loss": number(method["loss"]),
        "loss − LoRA's": interval(against and against["test_loss"], "+.4f"),
        "LoRA's steps / its own": interval(against and against["steps_ratio"], ".2f")
        if counts_steps(report)
        else "–",
        "diverged": str(method["diverged"]),
    }
    return row if metric != "loss" else {k: v for k, v in row.items() if not k.startswith("loss −")}


def studies(found: Found, section: Section) -> list[str]:
    """A table for each study, and the verdict over all of them."""
    reports = found["studies"]
    text = ["**Verdict.** " + " ".join(verdicts(reports, section))]
    for title, report in reports.items():
        text += [f"### {title}", budget(report)]
        text += [table([method_row(report, method) for method in report["methods"].values()])]
    return text


def verdicts(reports: Mapping[str, Found], section: Section) -> list[str]:
    """LoRA+ against LoRA over all studies; metrics that are no shares of 1 are not averaged with others."""
    shares = [
        title for title, report in reports.items() if report["protocol"]["metric"] not in LOWER_IS_BETTER
    ]
    groups = [shares, *([title] for title in reports if title not in shares)]
    text = []
    for titles in filter(None, groups):
        gain, _ = overall([reports[title] for title in titles], "lora_plus")
        metrics = ", ".join(dict.fromkeys(reports[title]["protocol"]["metric"] for title in titles))
        claimed = section.gain if titles is shares else None
        text.append(
            judge(f"Gain of LoRA+ over LoRA in {metrics} ({_over(titles)})", gain, "+.4f", claimed, 0.0)
        )
    counted = [title for title, report in reports.items() if counts_steps(report)]
    if not counted:
        return [*text, "Steps are not counted, as the curves have too few points."]
    _, ratio = overall([reports[title] for title in counted], "lora_plus")
    what = f"LoRA's steps over those of LoRA+ ({_over(counted)})"
    return [*text, judge(what, ratio, ".2f", section.steps, 1.0)]


def _over(titles: Sequence[str]) -> str:
    return f"mean over {len(titles)} data sets" if len(titles) > 1 else titles[0]


def glue_lines(found: Found, section: Section) -> list[str]:
    """The studies, after a table of all tasks by method, as the description has it."""
    reports = found["studies"]
    names = next(iter(reports.values()))["methods"]
    rows = []
    for name, method in names.items():
        # A study may be without `full`.
        values = [report["methods"].get(name, {"metric": None})["metric"] for report in reports.values()]
        row = {"method": method["label"], **dict(zip(reports, map(number, values), strict=True))}
        row["mean"] = number(None if None in values else float(np.mean(values)))
        rows.append(row)
    verdict, *rest = studies(found, section)
    left_out = [
        f'{title} was run without all weights: `--only {title} --sweep.methods "[lora_plus]"`.'
        for title, report in reports.items()
        if "full" not in report["methods"]
    ]
    return [table(rows), *left_out, verdict, *rest]


def text_lines(found: Found, section: Section) -> list[str]:
    """The studies, with the scores of the generated texts."""
    verdict, *rest = studies(found, section)
    text = []
    for title, report in found["studies"].items():
        rows = []
        for method in report["methods"].values():
            row = {"method": method["label"]}
            for name, score in method["text_scores"].items():
                row[name] = number(score["mean"], ".2f")
                row[f"{name} − LoRA's"] = interval(method["against_lora"] and score["gain"], "+.2f")
            rows.append(row)
        text += [f"### Texts of {title}", table(rows)]
        scores = report["methods"]["lora_plus"]["text_scores"]
        for name, claimed in CLAIMED_SCORES.items():
            gain = scores[name]["gain"]
            verdict += " " + judge(f"LoRA+ − LoRA in {name}", gain, "+.2f", claimed, 0.0)
        if texts := report["protocol"].get("texts"):
            text += [f"Scores of the texts for {texts} test inputs."]
    return [verdict, *text, NO_FULL, *rest]


CLAIMED_SCORES = {"bleu": 0.5, "rouge_l": 0.4}
"""The claimed gain of LoRA+ over LoRA, of 100."""
NO_FULL = (
    "Full fine-tuning is not among the methods here: each of its runs holds all weights and Adam's moments, three "
    "times the size of the model, in memory."
)


MAJORITY = (
    "An accuracy that two methods share on every seed does not compare them: few steps teach the form of the "
    "answer and the most frequent one."
)


def commonsense_lines(found: Found, section: Section) -> list[str]:
    """The studies, and what is left out."""
    return [*studies(found, section), NO_FULL, MAJORITY]


def lambda_lines(found: Found, _: Section) -> list[str]:
    """A line for each lambda: quality, steps to its best, and the share of unstable runs."""
    text = []
    for report in found["studies"].values():
        rows = []
        for method in report["methods"].values():
            runs = [run["curve"] for run in method["runs"] if not run["diverged"]]
            best = [min(curve, key=lambda point: point[1])[0] for curve in runs]
            row = method_row(report, method)
            del row["method"], row["λ"]
            unstable, of = unstable_runs(report, method)
            own = {"step of its best loss": number(float(np.mean(best)) if best else None, ".0f")}
            own["unstable"] = f"{unstable} of {of}"
            rows.append({"λ": method["label"], **row, **own})
        text += [lambda_verdict(report), budget(report), table(rows)]
        text += [
            "All λ try the same rates of A, and gradients are not clipped. Quality and steps are those of the best "
            "rate; the step of the best loss is the mean over the report seeds. Unstable are the runs of the "
            "search, over all rates, that diverged or ended at no lower a loss than before training."
        ]
    return text


def unstable_runs(report: Found, method: Found) -> tuple[int, int]:
    """How many runs of the search diverged or ended no lower than LoRA's runs begin, and of how many."""
    start = float(np.mean([run["curve"][0][1] for run in report["methods"]["lora"]["runs"]]))
    losses = [row["loss"] for row in method["search"]]
    return sum(loss is None or loss >= start for loss in losses), len(losses)


def lambda_verdict(report: Found) -> str:
    methods = report["methods"]
    others = {name: m for name, m in methods.items() if name != "lora"}
    known = {m["label"]: m["against_lora"]["test_loss"] for m in others.values()}
    known = {label: loss for label, loss in known.items() if loss["low"] is not None}
    better = [label for label, loss in known.items() if loss["high"] < 0]
    worse = [label for label, loss in known.items() if loss["low"] > 0]
    best = min(methods.values(), key=lambda m: math.inf if m["loss"] is None else m["loss"])["label"]
    counts = {m["label"]: unstable_runs(report, m) for m in methods.values()}
    unstable = [f"{label} ({some} of {of} runs)" for label, (some, of) in counts.items() if some]
    at_edge = [m["label"] for m in methods.values() if "learning_rate" in m["at_the_edge"]]
    speed = ""
    if counts_steps(report) and (claimed := methods.get("lambda_16")):
        ratio = claimed["against_lora"]["steps_ratio"]
        speed = judge("Steps of λ = 1 over those of λ = 16", ratio, ".2f", 2.0, 1.0) + " "
    return (
        f"**Verdict.** Lowest mean test loss: {best}. Significantly lower than at λ = 1: "
        f"{', '.join(better) or 'none'}; significantly higher: {', '.join(worse) or 'none'}. The claimed optimum, "
        f"λ = 16, is {'among' if 'λ = 16' in better else 'not among'} the significantly better. "
        f"{speed}Unstable: {', '.join(unstable) or 'no run'}. Best rate at the edge of the search range: "
        f"{', '.join(at_edge) or 'none'}."
    )


# The other tables.


def convergence_lines(found: Found, section: Section) -> list[str]:
    """The methods of each task; a training loss is a mean over ten steps."""
    text = []
    for task in found["studies"].values():
        size, length = task["batch"]
        rows = []
        for method in task["methods"]:
            share, saved = method.get("share"), method.get("steps saved")
            rows.append(
                {
                    "method": NAMES.get(method["method"], method["method"]),
                    "η_A": f"{method['rate of A']:g}{'*' if method['rate at the edge'] else ''}",
                    "λ": f"{method['lambda']:g}{'*' if method['lambda at the edge'] else ''}",
                    **{f"test {name}": interval(method[name], ".4f") for name in task["metrics"]},
                    "against": NAMES.get(method["against"], method["against"]) or "–",
                    "loss − its": interval(method.get("loss difference"), "+.4f"),
                    "its steps / own": interval(saved, ".2f"),
                    "share of steps to its final loss": share_text(share) if share else "–",
                    "diverged": f"{method['diverged']}",
                }
            )
        plus = next(method for method in task["methods"] if method["method"] == "lora+")
        text += [
            f"### {task['model']} on {task['data']}",
            "**Verdict.** "
            + judge("LoRA+ − LoRA in test loss", plus["loss difference"], "+.4f", None, 0.0, -1)
            + " "
            + judge("LoRA's steps over those of LoRA+", plus["steps saved"], ".2f", section.steps, 1.0)
            + f" LoRA+ reaches LoRA's final training loss {share_text(plus['share'])}; claimed: 60 %.",
            f"{task['steps']} steps of {size} × {length} tokens. Each method: {task['points']} settings × "
            f"{task['tuning_seeds']} seeds, reported on {task['report_seeds']} other seeds; 95 % intervals.",
            table(rows),
        ]
    text += [
        "Steps are counted on the training loss, averaged over ten steps. The last but one column has the share of "
        "LoRA's steps after which a method reaches LoRA's final loss, if it does. That measure "
        "favors whichever method may stop at a lucky step; the column before it is symmetric."
    ]
    return text


NAMES: dict[str | None, str] = {
    "lora": "LoRA",
    "lora+": "LoRA+",
    "lora, alpha x lambda": "LoRA, alpha × λ",
    "lora, init lora_b": "LoRA, A zero",
    "lora+, init lora_b": "LoRA+, A zero",
    "full": "all weights",
}


def share_text(share: Found) -> str:
    reached = f"on {share['reached']} of {share['pairs']} seeds"
    return (
        reached if share["median"] is None else f"after {100 * share['median']:.0f} % of the steps {reached}"
    )


def overhead_lines(found: Found, _: Section) -> list[str]:
    """Seconds and bytes of each method."""
    rows = {row["method"]: row for row in found["rows"]}
    lora, plus = rows["lora"], rows["lora_plus"]
    shown = [
        {
            "method": row["method"],
            "trained": f"{row['trainable']:,}",
            "optimizer state, MB": f"{row['optimizer_bytes'] / 1e6:.2f}",
            "memory of a step, MB": f"{row['peak_bytes'] / 1e6:.1f}",
            "GFLOP": f"{row['flops'] / 1e9:.4f}",
            "forward, ms": f"{1e3 * row['forward']:.0f}",
            "backward, ms": f"{1e3 * row['backward']:.0f}",
            "optimizer step, ms": f"{1e3 * row['optimizer']:.2f}",
            "step / LoRA's": f"{row['step_over_lora']:.3f}",
        }
        for row in found["rows"]
    ]
    size, length = found["batch"]
    more = {name: plus[name] / lora[name] for name in ("flops", "peak_bytes", "optimizer_bytes")}
    return [
        f"**Verdict.** LoRA+ needs {more['flops']:.4f} × LoRA's FLOPs, {more['peak_bytes']:.4f} × its memory and "
        f"{more['optimizer_bytes']:.4f} × its optimizer state. A step takes {plus['step_over_lora']:.3f} × the "
        f"time, the optimizer's part {plus['optimizer_over_lora']:.3f} × (medians of {found['rounds']} rounds; "
        "claimed: 1.125).",
        f"MiniLM's shape, {size} × {length} tokens, rank {found['rank']} on query and value, "
        f"{found['machine']['cores']} cores ({found['machine']['device']}). Memory is the compiler's: arguments "
        "and temporaries. Backward is the gradient's time less the forward pass.",
        table(shown),
    ]


# Pictures.


def draw_differences(figure: Any, found: Found) -> None:
    """Test loss of every method minus LoRA's, a panel for each study."""
    reports = found["studies"]
    methods = {n: m for report in reports.values() for n, m in report["methods"].items() if n != "lora"}
    names, labels = list(methods), [method["label"] for method in methods.values()]
    figure.set_size_inches(2 + 2.4 * len(reports), 1.6 + 0.35 * len(names))
    panels = figure.subplots(1, len(reports), squeeze=False, sharey=True)[0]
    for axes, (title, report) in zip(panels, reports.items(), strict=True):
        for row, name in enumerate(names):
            method = report["methods"].get(name)
            loss = method and method["against_lora"]["test_loss"]
            if loss and loss["low"] is not None:
                axes.hlines(row, loss["low"], loss["high"], color="#0b5fa5", linewidth=2)
                axes.plot(loss["mean"], row, "o", color="#0b5fa5")
        axes.axvline(0, color="black", linewidth=1, linestyle="--")
        axes.set(title=title, xlabel="test loss − LoRA's")
        axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(names)), labels)
        axes.grid(axis="x", alpha=0.3)


def draw_lambda(figure: Any, found: Found) -> None:
    """Test loss and share of unstable runs over lambda."""
    (report,) = found["studies"].values()
    methods = list(report["methods"].values())
    figure.set_size_inches(6.4, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for place, method in enumerate(methods):
        losses = [run["test"]["loss"] for run in method["runs"] if not run["diverged"]]
        upper.plot([place] * len(losses), losses, "o", color="#0b5fa5", alpha=0.5)
        if losses:
            upper.hlines(np.mean(losses), place - 0.3, place + 0.3, color="#b04a00", linewidth=2)
        unstable, of = unstable_runs(report, method)
        lower.bar(place, unstable / of, color="0.5")
    upper.set(ylabel="test loss", title="Best rate of each λ; bars are means over the seeds")
    lower.set(ylabel="share unstable", xlabel="λ", ylim=(0, 1))
    lower.set_xticks(range(len(methods)), [method["label"] for method in methods])


def draw_convergence(figure: Any, found: Found) -> None:
    """Training loss against steps: mean and range over the report seeds."""
    figure.set_size_inches(5.2 * len(found["studies"]), 4.4)
    panels = figure.subplots(1, len(found["studies"]), squeeze=False)[0]
    for axes, task in zip(panels, found["studies"].values(), strict=True):
        shown = [m for m in task["methods"] if m["method"] != "lora, alpha x lambda"]
        for color, method in enumerate(shown):
            steps, mean, low, high = np.array(method["curve"]).T
            axes.plot(steps, mean, color=f"C{color}", label=NAMES[method["method"]])
            axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.12, linewidth=0)
        axes.set(
            title=f"{task['model']} on {task['data']}",
            xlabel="step",
            ylabel="training loss, mean of 10 steps",
        )
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)


def draw_overhead(figure: Any, found: Found) -> None:
    """Milliseconds of the parts of a step."""
    figure.set_size_inches(6.4, 3.6)
    axes, left = figure.subplots(), np.zeros(len(found["rows"]))
    for part in ("forward", "backward", "optimizer"):
        values = np.array([1e3 * row[part] for row in found["rows"]])
        axes.barh(range(len(values)), values, left=left, label=part)
        left = left + values
    axes.set_yticks(range(len(left)), [row["method"] for row in found["rows"]])
    axes.set(xlabel="ms")
    axes.legend(frameon=False)


NO_TABLE = "Has heat maps over (η_A, η_B) and no table of results; the abstract says 1 to 2 % better."
SECTIONS = {
    "overhead": Section(
        "Memory and compute overhead",
        "7B model: the same memory, forward and backward pass as LoRA; the optimizer step takes 12.5 % more time.",
        "Names no cost; λ only changes a factor in B's update.",
        overhead_lines,
        draw_overhead,
    ),
    "convergence": Section(
        "Convergence speed",
        "LLaMA-7B on Alpaca: LoRA+ reaches LoRA's final loss in about 60 % of the steps.",
        "The abstract says up to about twice as fast and 1 to 2 % better; there is no theorem on speed.",
        convergence_lines,
        draw_convergence,
        steps=1 / 0.6,
    ),
    "lambda": Section(
        "Learning rate ratio",
        "LLaMA-7B on MMLU: accuracy 41.3 % at λ = 1 and 42.1 % at the optimum λ = 16, in half the steps; unstable "
        "from 32 on.",
        "The best ratio is of the order of the width, with an unknown constant. Best ratios in its heat maps: 4 to "
        "8 for RoBERTa with B zero at the start, about 16 with A zero, 2 to 4 for Llama.",
        lambda_lines,
        draw_lambda,
    ),
    "glue": Section(
        "GLUE",
        "RoBERTa-base: mean of four tasks 91.4 against LoRA's 90.9, in 1.54 times fewer steps.",
        NO_TABLE,
        glue_lines,
        draw_differences,
        gain=0.005,
        steps=1.54,
    ),
    "e2e": Section(
        "E2E NLG",
        "GPT-2: BLEU 68.0 against LoRA's 67.5, ROUGE-L 71.2 against 70.8, full fine-tuning 68.2 and 71.4; 1.67 "
        "times faster.",
        "Has no E2E experiment.",
        text_lines,
        draw_differences,
        steps=1.67,
    ),
    "commonsense": Section(
        "Commonsense questions",
        "LLaMA-7B: mean of four sets 76.7 against LoRA's 75.9, in 1.56 times fewer steps.",
        "Has no commonsense experiment.",
        commonsense_lines,
        draw_differences,
        gain=0.008,
        steps=1.56,
    ),
    "methods": Section(
        "Other methods",
        "LLaMA-7B, ten benchmarks: full 67.8 %, LoRA 66.2 %, LoRA+ 67.0 %, DoRA 67.2 %, AdaLoRA 66.8 %; LoRA+ "
        "takes 5,000 steps, LoRA 8,000, DoRA 8,500, AdaLoRA 9,000.",
        "Compares LoRA+ with LoRA alone.",
        studies,
        draw_differences,
        gain=0.008,
        steps=1.6,
    ),
}
