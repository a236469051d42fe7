"""docs/performance.md, its tables and pictures, from the JSON files that the benchmarks wrote.

python benchmarks/performance.py
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import plan_scaling
from common import RESULTS, table
from step_time_report import goal
from sweep import TWO_SEEDS

from loraplus_jax._utils.atomic import write_text
from loraplus_jax.training.metrics_log import pyplot, save_figure

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "performance"
NAMES = {"here": "loraplus_jax", "peft": "PEFT"}
"""Of runs, where the files have others."""
Found = Mapping[str, Any]
"""The content of a benchmark's JSON file."""


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      title: heading.
      text: what is measured, and what limits it.
      command: the benchmark that prints the numbers.
      file: name of its JSON file.
      lines: Markdown of the numbers.
      draw: draws them on a figure, if there is a picture.
    """

    title: str
    text: str
    command: str
    file: str
    lines: Callable[[Found], list[str]]
    draw: Callable[[Any, Found], None] | None = None

    @property
    def picture(self) -> Path:
        """Where the picture is."""
        return PICTURES / f"{self.file}.png"


def read() -> dict[str, Found]:
    """The files of all sections that have been measured, by name."""
    paths = {section.file: RESULTS / f"{section.file}.json" for section in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def page(files: Mapping[str, Found]) -> str:
    """The whole page, in Markdown."""
    text = [HEAD]
    for section in SECTIONS:
        text += [f"## {section.title}", section.text]
        if section.file not in files:
            text.append(f"**Not measured**: `python benchmarks/{section.command}`.")
            continue
        found = files[section.file]
        text.append(f"`python benchmarks/{section.command}` on {machine_of(found)}:")
        if section.draw is not None:
            text.append(f"![{section.title}](performance/{section.picture.name})")
        text += section.lines(found)
    return "\n\n".join(text) + "\n"


def write_page() -> None:
    """Writes the page and its pictures."""
    PICTURES.mkdir(exist_ok=True)
    files = read()
    for section in SECTIONS:
        if section.draw is not None and section.file in files:
            figure = pyplot().figure(layout="constrained", figsize=(9, 3.6))
            section.draw(figure, files[section.file])
            save_figure(figure, section.picture)
    write_text(DOCS / "performance.md", page(files))


def machine_of(found: Found) -> str:
    """The machine and versions of a file."""
    machine = dict((found if "machine" in found else next(iter(found.values())))["machine"])
    device, processor, cores = machine.pop("device"), machine.pop("processor", None), machine.pop("cores")
    where = f"{cores} cores of {processor}" if processor and device.endswith("cpu") else device
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "loraplus_jax")
    return f"{where} ({versions})"


def goals_of(found: Found) -> str:
    """The goals as a table, with whether they were met."""
    rows = [
        {
            "goal": goal["what"],
            "asked for": f"{goal.get('bound', 'at most')} {goal['goal']}",
            "measured": goal["measured"],
            "": goal["met"],
        }
        for goal in found["goals"]
    ]
    return table(rows)


def step_lines(found: Found) -> list[str]:
    columns = ("shape", "run", "step, s", "time / PEFT", "peak, MB", "memory / PEFT", "share of peak")
    rows = [{name: row[name] for name in columns} for row in found["rows"]]
    ranges = [
        f"{min(run['seconds']):.2f} to {max(run['seconds']):.2f} s ({NAMES[name]}, {shape})"
        for shape, runs in found["runs"].items()
        for name, run in runs.items()
        if name in NAMES and "seconds" in run
    ]
    rows = [row | {"run": NAMES.get(row["run"], row["run"])} for row in rows]
    return [table(rows), f"Steps took {', '.join(ranges)}.", goals_of(found)]


def profile_lines(found: Found) -> list[str]:
    """The table, and how much of a step is matrix products."""
    rows = [
        {key.replace("here", NAMES["here"]): value for key, value in row.items()} for row in found["rows"]
    ]
    shares = []
    for shape, runs in found["seconds"].items():
        products = sum(seconds for name, seconds in runs["here"].items() if "products" in name)
        shares.append(f"{100 * products / sum(runs['here'].values()):.0f} % at {shape}")
    return [table(rows), f"Products with weights and those of attention: {', '.join(shares)}."]


def draw_profile(figure: Any, found: Found) -> None:
    """A bar for each run, split by component, the largest first."""
    runs = {
        f"{shape}\n{NAMES.get(run, run)}": Counter(parts)
        for shape, both in found["seconds"].items()
        for run, parts in both.items()
    }
    axes, left = figure.subplots(), dict.fromkeys(runs, 0.0)
    axes.set_prop_cycle(color=pyplot().colormaps["tab20"].colors)
    for name, _ in sum(runs.values(), Counter()).most_common():
        axes.barh(list(runs), [parts[name] for parts in runs.values()], left=list(left.values()), label=name)
        left = {run: left[run] + parts[name] for run, parts in runs.items()}
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a step")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_cost(figure: Any, found: Found) -> None:
    """Step time and temporaries against depth, length and rank, each relative to the smallest case."""
    varied = list(dict.fromkeys(row["varied"] for row in found["rows"]))
    for axes, name in zip(figure.subplots(1, len(varied)), varied, strict=True):
        rows = [row for row in found["rows"] if row["varied"] == name]
        for key, label in (("step, s", "step time"), ("temporaries, MB", "temporaries")):
            axes.plot(
                [row[name] for row in rows], [row[key] / rows[0][key] for row in rows], "o-", label=label
            )
        axes.set(xlabel=name, ylabel="relative to the smallest", ylim=(0, None))
        axes.legend(fontsize=7)


def draw_size(figure: Any, found: Found) -> None:
    """A member's step time, and temporaries, against the number of members."""
    left, right = figure.subplots(1, 2)
    for way in dict.fromkeys(row["way"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["way"] == way]
        members = [row["members"] for row in rows]
        left.plot(members, [row["step_seconds_per_member"] for row in rows], "o-", label=way)
        right.plot(members, [row["temporaries_mb"] for row in rows], "o-", label=way)
    left.set(xlabel="members", ylabel="s of a step, for each member", ylim=(0, None))
    right.set(xlabel="members", ylabel="temporaries, MB", ylim=(0, None))
    left.legend(fontsize=7)


def pod_lines(found: Found) -> list[str]:
    """The plans, and what kernels and the search bring on the largest pod."""
    pod = "llama2_7b@v5e:16x16"
    before, kernel, best = (found[f"{pod}{changed}"]["roofline"] for changed in POD_LAYOUTS)
    goals = [
        goal(f"{pod}, bytes' time / FLOPs' time with a kernel", kernel["memory"] / kernel["compute"], 1.0),
        goal(f"{pod}, searched / before", max(best.values()) / max(before.values()), 0.75),
    ]
    rows = [plan_scaling.row(case, plan) for case, plan in found.items()]
    return [table(rows), goals_of({"goals": goals})]


POD_LAYOUTS = (
    " --model.attention=blocked",
    "",
    " --model.remat=dots --model.attention=splash --model.loss_chunk=2048",
)
"""Without a kernel, with the one that `auto` takes, and as the search finds."""


def sweep_lines(found: Found) -> list[str]:
    """The times of a step, the shares, and the goal for a whole answer."""
    ways = [
        {"members on": where, "sweep": way, **shares}
        for where, answers in found["answer"].items()
        for way, shares in answers.items()
    ]
    return [
        table(found["rows"]),
        "A whole sweep's time over that of sixteen single runs, by its report:",
        table(ways),
        goals_of(
            {
                "goals": [
                    goal(f"the answer with 2 report seeds on {where}", answers["default"][TWO_SEEDS], 0.3333)
                    for where, answers in found["answer"].items()
                ]
            }
        ),
    ]


def generation_lines(found: Found) -> list[str]:
    rows = [row | {"run": NAMES.get(row["run"], row["run"])} for row in found["rows"]]
    return [table(rows), goals_of(found)]


def start_lines(found: Found) -> list[str]:
    rows = [row | {"what": row["what"].replace("here", NAMES["here"])} for row in found["rows"]]
    return [table(rows), goals_of(found)]


def rows_lines(found: Found) -> list[str]:
    return [table(found["rows"]), *([goals_of(found)] if "goals" in found else [])]


HEAD = """# Performance: cost, limits and peers

This page lists what a training step, a sweep, generation and a start cost, what limits each, and other packages
beside it. `python benchmarks/performance.py` writes it from `benchmarks/results/`.

Times are medians over rounds in which all runs take turns, and ratios are medians of the rounds' own ratios, as
machines are noisy. Nothing here was timed on a GPU or TPU."""

STEP = """SmolLM2-135M's shape, adapters of rank 8 on q, k, v and o, float32; the same weights, batch and rates in
every run, so that all losses agree to 3e-6, the first and the last.

- *no adapters* is our model's loss and the gradient of its input: the cost that every adapter adds to.
- *qwix* has its adapters on our model. *tunix* has its own Llama, loss and trainer, with qwix's adapters; version
  0.1.7 leaves the config's `rope_theta` out of its attention, so the benchmark passes it.
- *matmul* is the weights' products alone. The share of peak is the FLOPs that a step needs over its time and over
  the rate of one large product.

The ratios depend on the processor. An earlier run on two other cores had 0.956 and 0.955 times PEFT's time, and
one on an AMD processor 0.58 and 0.56 times."""

PROFILE = """By traces of the compiled step. XLA on a CPU copies each layer's weights out of the stack before their
product: these are the slices of stacked weights."""

COST = """Depth, length and rank, one varied at a time, relative to the smallest. Compare step times only within a
panel: the three were not measured in turns. The loop over layers keeps compilation from growing with depth."""

GPU = """The same comparison in bfloat16, with PEFT compiled by torch. No GPU was available, and without one the
compiled program cannot be inspected either. `quantized.py --backend gpu` and `sweep.py time --backend gpu` measure
the packed base and a population there."""

POD = """Llama-2-7B and Llama-3-70B, one row of 2,048 tokens a chip, compiled without the chips ([how far to
trust it](plan_accuracy.md)). The limit is the largest of the times that FLOPs, bytes and network take
at the chip's rates. *blocked* is attention without a kernel, as before; the row with `remat=dots` is what
[the search](plan.md#search-for-the-fastest-layout) finds."""

PACKED = "The same step on packed weights: [training on a quantized base](quantized_base.md)."

SWEEP = """Sixteen settings of the quickstart as one population, beside single runs; then the time of a whole sweep
over that of sixteen single runs, by what its report compares. Two devices are `JAX_NUM_CPU_DEVICES=2` on two cores:
each trains its own members with one thread, so that the cores do not wait for each other."""

SIZE = "A member's step, and the memory of the population's step, against the number of members."

GENERATION = """Greedy decoding beside transformers, with the same weights, prompts and cores; the texts are
compared token for token. The limit is to read all weights once a token: 538 MB, so at 34 tokens/s for a prompt the
cores read 18 GB/s. Each layer's weights are read in place; a loop over layers copies them first, which moves three
times the bytes. The first step includes imports and compilation."""

START = """New processes, in turn; data and weights are already downloaded. The quickstart evaluates 2,008 sentences
before its first step, which is most of the time to it. Loading safetensors transposes and stacks the weights for
Flax, where transformers maps the file into memory."""

SECTIONS = (
    Section("A training step", STEP, "step_time.py --rounds 7", "step_time_cpu", step_lines),
    Section(
        "Where a step's time goes",
        PROFILE,
        "step_time.py --profile",
        "step_time_profile_cpu",
        profile_lines,
        draw_profile,
    ),
    Section("How the cost grows", COST, "step_time.py --cost", "step_time_cost_cpu", rows_lines, draw_cost),
    Section("A step on a GPU", GPU, "step_time.py --backend gpu", "step_time_gpu", step_lines),
    Section("A step on a TPU pod", POD, "plan_scaling.py", "plan_scaling", pod_lines),
    Section("A 4-bit base", PACKED, "quantized.py", "quantized_cpu", rows_lines),
    Section("A sweep", SWEEP, "sweep.py time --rounds 5", "sweep_time", sweep_lines),
    Section("Members of a population", SIZE, "sweep.py size --rounds 5", "sweep_size", rows_lines, draw_size),
    Section(
        "Generation",
        GENERATION,
        "generate.py --peers transformers --rounds 5",
        "generate_cpu",
        generation_lines,
    ),
    Section("Start-up", START, "startup.py", "startup_cpu", start_lines),
)


if __name__ == "__main__":
    write_page()
