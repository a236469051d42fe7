"""Renders a plan as text: tables, whether it fits, and what to change."""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from .._utils.atomic import to_json, write_text
from ..settings.schema import Settings
from .hlo import Collective
from .plan import Plan
from .search import MARGIN, Search, Trial

LARGEST_SHOWN, REDUCTIONS = 5, 3
"""Number of collectives listed separately: the largest of all, and further reductions."""
BOUND_NAMES = {
    "compute": "FLOPs",
    "memory": "bytes accessed",
    "network": "bytes received",
}
_BOUNDS = {"compute": "compute-bound", "memory": "HBM-bound", "network": "network-bound"}


def format_plan(plan: Plan, settings: Settings) -> str:
    """The full text of a plan, for the console."""
    tips = [] if plan.fits else [f"- {line}" for line in advice(plan, settings)]
    parts = [_heading(plan), _memory(plan), _verdict(plan, settings), *tips, "", _work(plan)]
    return "\n".join(
        [*parts, *_communication(plan), *_weight_traffic(plan, settings), *_weight_reductions(plan)]
    )


def write_json(path: Path, plan: Plan, settings: Settings) -> None:
    """Writes the plan and its advice as a JSON object; raises ValueError if the file exists."""
    content = plan.to_json() | {"advice": [] if plan.fits else advice(plan, settings)}
    write_text(path, to_json(content, indent=1) + "\n", new=True)


def format_search(search: Search, settings: Settings, command: Sequence[str]) -> str:
    """The layouts that a search counted or compiled, those it skipped, and the command of the fastest that fits."""
    times = tuple(f"{name}, ms" for name in BOUND_NAMES)
    rows = [("data x fsdp x tensor", *_LAYOUT, "needed", *times, "s", "")]
    rows += [_trial_row(search, trial) for trial in _tried(search)]
    lines = [_table(rows), "", *_skipped(search)]
    start, best = search.start, search.best
    if search.rejected is not None:
        lines.append(f"training rejects the settings as they are: {search.rejected}")
    if best is not None:
        lines.append(f"fastest layout that fits: {best.seconds:.3f} s per step")
        if start is not None and start.plan is not None:
            lines[-1] += f", {best.seconds / start.seconds:.2f} x that of the settings as they are"
        lines += ["", search_command(search, settings, command), ""]
    return "\n".join(lines)


_LAYOUT = ("micro-batches", "remat", "attention", "loss chunk")


def search_command(search: Search, settings: Settings, command: Sequence[str]) -> str | None:
    """The command line that trains with the fastest layout; None if none fits."""
    if search.best is None:
        return None
    return shlex.join([*command, *search.best.layout.options(settings, search.current)])


def explain_no_fit(search: Search) -> str:
    """Why a search found no layout that fits."""
    if not search.complete:
        return "the search was interrupted before a layout was known to fit"
    least = min(trial.needed for trial in search.trials)
    return (
        f"no layout fits: every one needs at least {_size(least)} per device; use a larger topology, a smaller "
        "data.max_length, or for the weights model.param_dtype bfloat16 or model.quantize"
    )


def write_search(path: Path, search: Search, settings: Settings, command: Sequence[str]) -> None:
    """Writes a search's command, plan and layouts as a JSON object; raises ValueError if the file exists."""
    best = search.best
    plan = None if best is None or best.plan is None else best.plan.to_json()
    layouts = [
        trial.layout._asdict()
        | {"needed": trial.needed, "times": trial.times, "seconds": trial.seconds, "problem": trial.problem}
        | {"counted": trial.work is not None, "compiled": trial.plan is not None}
        for trial in search.trials
    ]
    content = {
        "command": search_command(search, settings, command),
        "complete": search.complete,
        "rejected": search.rejected,
        "current": search.current._asdict(),
        "best": None if best is None else best.layout._asdict(),
        "plan": plan,
        "layouts": layouts,
    }
    write_text(path, to_json(content, indent=1) + "\n", new=True)


def _tried(search: Search) -> list[Trial]:
    """Compiled trials, then one of each kind that was only counted; the fastest first."""
    compiled = [trial for trial in search.trials if trial.plan is not None]
    kinds = {trial.layout.kind for trial in compiled}
    counted = {
        trial.layout.kind: trial
        for trial in reversed(search.trials)  # the first of each kind stays
        if trial.work is not None and trial.layout.kind not in kinds
    }
    return [
        *sorted(compiled, key=lambda trial: (trial.problem is not None, trial.seconds)),
        *sorted(counted.values(), key=lambda trial: trial.seconds),
    ]


def _trial_row(search: Search, trial: Trial) -> tuple[str, ...]:
    layout = trial.layout
    result = "counted" if trial.plan is None else trial.problem or "fits"
    if trial is search.best:
        result += ", fastest"
    elif layout == search.current:
        result += ", the settings as they are"
    if trial.work is not None and trial.work.loops:
        result += ", bytes too low"
    at_least = "" if trial.plan is not None else "> "
    return (
        " x ".join(map(str, layout.mesh)),
        *map(str, (layout.accumulate, layout.remat, layout.attention, layout.loss_chunk)),
        at_least + _size(trial.needed),
        *(f"{1e3 * seconds:.1f}" for seconds in trial.times.values()),
        f"{trial.seconds:.3f}",
        result,
    )


def _skipped(search: Search) -> list[str]:
    """How many layouts were not compiled, and why."""
    left = [trial for trial in search.trials if trial.plan is None]
    problems = Counter(trial.problem for trial in left if trial.problem is not None)
    lines = [f"{number:,} of {len(search.trials):,} layouts: {name}" for name, number in problems.items()]
    slower = [trial for trial in left if trial.problem is None]
    if not slower:
        return lines
    bound = min(trial.seconds for trial in slower)
    reason = (
        f"cannot be faster by more than {100 * MARGIN:.0f} %"
        if search.complete
        else "not compiled, as the search was interrupted"
    )
    return [
        *lines,
        f"{len(slower):,} of {len(search.trials):,} layouts: {reason} (at least {bound:.3f} s)",
    ]


def _heading(plan: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    micro = plan.rows // plan.accumulate
    micro_batches = f" in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    return (
        f"{plan.model}: {plan.layers} layers, {plan.trained:,} of {plan.total:,} parameters trained\n"
        f"{plan.devices} x {plan.device}, mesh {mesh}\n"
        f"step: {plan.rows:,} x {plan.tokens:,} tokens{micro_batches}, {micro // shards:,} x {plan.tokens:,} "
        f"at a time per device; compiled in {plan.compile_seconds:.0f} s\n"
    )


def _memory(plan: Plan) -> str:
    rows = [("memory per device", ""), *((name, _size(size)) for name, size in plan.memory.items())]
    rows.append(("total needed", _size(plan.needed)))
    if plan.peak:
        rows.append(("peak memory (compiler)", _size(plan.peak)))
    rows.append(("evaluation (not concurrent)", "-" if plan.evaluation is None else _size(plan.evaluation)))
    if plan.theory is not None:
        rows.append(("theory metrics (not concurrent)", _size(plan.theory)))
    rows.append(("available", _size(plan.room)))
    return _table(rows)


_UNCOUNTED = {
    "multiple_choice": "; evaluation is not counted, as the number of choices per question depends on the data",
    "generation": "; the beam search of an evaluation is not counted",
}
"""What a plan leaves out, by task."""


def _verdict(plan: Plan, settings: Settings) -> str:
    if plan.fits:
        left_out = _UNCOUNTED.get(settings.task, "")
        return f"fits: {100 * plan.most / plan.room:.0f} % of the available memory{left_out}"
    if plan.problem is None:
        return f"does not fit: {_size(plan.most - plan.room)} more than available"
    return f"does not fit; compiler message: {plan.problem:.300}"


def advice(plan: Plan, settings: Settings) -> list[str]:
    """What to change so that a plan fits, largest part of the memory first.

    Numbers follow from shapes and shardings; effects that only a compilation can confirm are marked "not compiled".
    """
    between_steps = [*_advise_evaluation(plan, settings), *_advise_theory(plan, settings)]
    if between_steps and plan.needed <= plan.room:
        return between_steps
    held = sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    weights, activations = _advise_weights(plan, settings), _advise_activations(plan, settings)
    return [
        *between_steps,
        *([*weights, *activations] if held > plan.memory["temporaries"] else [*activations, *weights]),
    ]


def _advise_evaluation(plan: Plan, settings: Settings) -> list[str]:
    size, rows = plan.evaluation, settings.train.eval_batch_size
    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    if size is None or size <= plan.room or rows == parts:
        return []
    return [
        f"train.eval_batch_size below {rows:,}, a multiple of {parts}: evaluation needs {_size(size)}, the "
        f"step {_size(plan.needed)}"
    ]


def _advise_theory(plan: Plan, settings: Settings) -> list[str]:
    if plan.theory is None or plan.theory <= plan.room:
        return []
    return [
        f"train.theory_every null: theory metrics need {_size(plan.theory)}, the step {_size(plan.needed)}"
    ]


def _advise_weights(plan: Plan, settings: Settings) -> list[str]:
    frozen, trained = plan.memory["frozen weights"], plan.memory["trained"] + plan.memory["optimizer"]
    data, fsdp, is_full = plan.mesh["data"], plan.mesh["fsdp"], settings.method == "full"
    # B is replicated on every device, so with adapters a larger fsdp axis shards only the base weights.
    name, split = ("weights and optimizer", frozen + trained) if is_full else ("frozen weights", frozen)
    tips = []
    if trained > frozen:
        tips += _advise_trained(plan, settings, trained)
    if data > 1 and split:
        tips.append(
            f"mesh.data 1 and mesh.fsdp {data * fsdp}: a device holds about {_size(split / data)} of {name} "
            f"instead of {_size(split)}"
        )
    if settings.model.param_dtype == "float32" and frozen:
        tips.append(
            f"model.param_dtype bfloat16: the frozen weights take {_size(frozen / 2)} instead of "
            f"{_size(frozen)}"
        )
    return tips or [f"more devices for mesh.fsdp, which shards the weights (devices now: {plan.devices:,})"]


def _advise_trained(plan: Plan, settings: Settings, size: int) -> list[str]:
    """Advice if trained parameters and optimizer state take most of the memory."""
    if settings.method == "full":
        return [
            f"method lora_plus: the optimizer state, {_size(plan.memory['optimizer'])} now, shrinks to the "
            "moments of the adapters (not compiled)"
        ]
    tips = []
    if settings.lora.modules_to_save:
        tips.append(
            "fewer lora.modules_to_save: these modules train all their weights (trained weights and "
            f"optimizer state take {_size(size)} now)"
        )
    if settings.lora.rank > 1:
        tips.append(
            f"lora.rank below {settings.lora.rank}: adapters and optimizer state, {_size(size)} now, shrink "
            "in proportion"
        )
    return tips


def _advise_activations(plan: Plan, settings: Settings) -> list[str]:
    rows = plan.rows // plan.accumulate // (plan.mesh["data"] * plan.mesh["fsdp"])
    tips = []
    if rows > 1:
        tips.append(
            f"train.accumulate {plan.accumulate * rows}: a device processes 1 row at a time instead of "
            f"{rows}; most of the temporaries, {_size(plan.memory['temporaries'])} now, shrink in proportion "
            "(not compiled)"
        )
    if settings.is_language and settings.model.remat != "full":
        tips.append("model.remat full: keeps only each layer's input for the backward pass (not compiled)")
    if (mesh := more_tensor(plan.mesh, plan.tensor_sizes)) is not None:
        sizes = ", ".join(f"mesh.{name} {size}" for name, size in mesh.items())
        tips.append(
            f"{sizes} and train.accumulate {plan.rows // (mesh['data'] * mesh['fsdp'])}: a device computes "
            "fewer heads and a smaller part of the MLP, 1 row at a time (not compiled)"
        )
    fewer = ", or a smaller train.batch_size" if rows > 1 else ""
    return [*tips, f"data.max_length below {plan.tokens:,}{fewer}"]


def more_tensor(mesh: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The next mesh of as many devices with a larger tensor axis that divides the model's sizes, or None.

    >>> more_tensor({"data": 2, "fsdp": 3, "tensor": 1}, {"num_attention_heads": 12})
    {'data': 1, 'fsdp': 3, 'tensor': 2}
    >>> more_tensor({"data": 8, "fsdp": 1, "tensor": 1}, {"num_attention_heads": 3})
    """
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    largest = math.gcd(*sizes.values())
    for size in range(2 * tensor, largest + 1, tensor):
        data_factor = math.gcd(data, size // tensor)
        fsdp_factor = size // tensor // data_factor
        if largest % size == 0 and fsdp % fsdp_factor == 0:
            return {"data": data // data_factor, "fsdp": fsdp // fsdp_factor, "tensor": size}
    return None


def _work(plan: Plan) -> str:
    """FLOPs and bytes, the time that each takes at the peak rate, and which of them is the bound."""
    if plan.work is None:
        return "work is not counted: the programs that count it need more memory than available"
    rows = [("work per device and step", "", "ms at peak rate")]
    amounts = {
        "compute": f"{plan.work.flops / 1e9:,.2f} GFLOP",
        "memory": _size(plan.work.bytes),
        "network": _size(plan.received),
    }
    for name, amount in amounts.items():
        seconds = plan.roofline.get(name)
        rows.append((BOUND_NAMES[name], amount, "-" if seconds is None else f"{1e3 * seconds:.1f}"))
    lines = [_table(rows)]
    if plan.work.loops:
        lines.append(
            f"FLOPs and bytes are too low: only one iteration is counted of {plan.work.loops} loops with "
            "matmuls"
        )
    if plan.work.kernels:
        lines.append(f"FLOPs are too low: those of {plan.work.kernels} kernels are not counted")
    if plan.roofline:
        name, seconds = max(plan.roofline.items(), key=lambda item: item[1])
        rate = plan.rows * plan.tokens / seconds
        lines.append(f"roofline: {seconds:.3f} s per step, {rate:,.0f} tokens/s; {_BOUNDS[name]}")
    return "\n".join(lines)


def _communication(plan: Plan) -> list[str]:
    """Collectives by kind and group size, and the largest of them."""
    if not plan.collectives:
        return []
    counts: dict[tuple[str, int], int] = defaultdict(int)
    sizes: dict[tuple[str, int], float] = defaultdict(float)
    received: dict[tuple[str, int], float] = defaultdict(float)
    for collective in plan.collectives:
        key = (collective.kind, collective.group)
        counts[key] += collective.times
        sizes[key] += collective.times * collective.bytes
        received[key] += collective.times * collective.wire_bytes
    rows = [("collectives per step", "devices", "count", "full size", "received")]
    for kind, group in sorted(counts, key=lambda key: -received[key]):
        key = (kind, group)
        rows.append((kind, f"{group:,}", f"{counts[key]:,}", _size(sizes[key]), _size(received[key])))
    return ["", _table(rows), "", _table(_largest_rows(plan.collectives))]


def _largest_rows(all_collectives: Sequence[Collective]) -> list[tuple[str, ...]]:
    """The equal collectives that receive most, and the largest further reductions."""
    times: Counter[Collective] = Counter()
    for collective in all_collectives:
        times[collective._replace(where="", times=1)] += collective.times
    groups = sorted(times, key=lambda collective: -times[collective] * collective.wire_bytes)
    reductions = [
        collective
        for collective in groups[LARGEST_SHOWN:]
        if collective.kind in ("all-reduce", "reduce-scatter")
    ]
    rows = [("largest collectives", "arrays", "devices", "count", "full size, each", "received")]
    for collective in [*groups[:LARGEST_SHOWN], *reductions[:REDUCTIONS]]:
        received = times[collective] * collective.wire_bytes
        cells = (f"{collective.group:,}", f"{times[collective]:,}", _size(collective.bytes), _size(received))
        rows.append((collective.kind, _arrays(collective.shape), *cells))
    return rows


def _arrays(shape: str) -> str:
    """The arrays of a tuple with their counts; at most two distinct ones, the rest as a number.

    >>> _arrays("f32[3,8], f32[8,3], f32[3,8]")
    '2 f32[3,8], f32[8,3]'
    """
    arrays = Counter(shape.split(", ")).items()
    texts = [array if number == 1 else f"{number} {array}" for array, number in arrays]
    rest = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
    return ", ".join(texts[:2]) + rest


def _weight_traffic(plan: Plan, settings: Settings) -> list[str]:
    """How often a step receives the weights sharded over `fsdp`; forward and backward need them once each."""
    frozen = (plan.total - plan.trained) * jnp.dtype(settings.model.param_dtype).itemsize
    if not frozen or plan.mesh["fsdp"] == 1 or plan.mesh["tensor"] > 1:
        return []
    by_reduction = bool(_weight_reductions(plan))
    kinds = ("all-gather", "collective-permute", *(["all-reduce"] if by_reduction else []))
    received = sum(c.times * c.wire_bytes for c in plan.collectives if c.kind in kinds)
    times = received / plan.accumulate / frozen
    micro = " per micro-batch" if plan.accumulate > 1 else ""
    names = "all-gathers, permutes and all-reduces" if by_reduction else "all-gathers and permutes"
    return [
        f"received by {names}: {times:.2f} x the frozen weights{micro}; 2 means once each in the forward and "
        "backward pass"
    ]


def _weight_reductions(plan: Plan) -> list[str]:
    """A line if all-reduces carry weights: XLA gathers by all-reduce what is sharded into many parts."""
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    reduced = sum(c.times * c.bytes for c in plan.collectives if c.kind == "all-reduce")
    gradients = 4 * plan.trained * plan.accumulate  # float32, at most once per micro-batch
    # A tensor axis also all-reduces activations, so there the bytes say nothing about weights.
    if plan.mesh["tensor"] > 1 or fsdp == 1 or reduced < 10 * gradients:
        return []
    factor = next(n for n in range(2, fsdp + 1) if fsdp % n == 0)
    return [
        f"all-reduces carry {_size(reduced)}, but the gradients at most {_size(gradients)}: XLA gathers "
        "weights by all-reduce, which receives twice as much as all-gather; fewer shards may help: "
        f"mesh.data {factor * data} and mesh.fsdp {fsdp // factor} (not compiled)"
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns the first column left and all others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _size(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point.

    >>> _size(0), _size(1234.5), _size(16e9)
    ('0 B', '1.23 kB', '16.00 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
