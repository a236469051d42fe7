"""A plan in words: tables, whether it fits, and what to change."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from ..settings.schema import Settings
from .hlo import Collective
from .plan import Plan

LARGEST_SHOWN, REDUCTIONS = 5, 3
"""Groups of collectives that are shown one by one: of all, and of reductions that are not among these."""
BOUND_NAMES = {
    "compute": "FLOPs",
    "memory": "bytes accessed",
    "network": "bytes received from others",
}


def format_plan(plan: Plan, settings: Settings) -> str:
    """All of a plan, for the screen."""
    tips = [] if plan.fits else [f"- {line}" for line in advice(plan, settings)]
    parts = [_heading(plan), _memory(plan), _verdict(plan), *tips, "", _work(plan)]
    return "\n".join(
        [*parts, *_communication(plan), *_weight_traffic(plan, settings), *_weight_reductions(plan)]
    )


def check_new(path: Path) -> None:
    """Raises ValueError unless a new file can be made there, which is tried; nothing is left behind."""
    if path.exists():
        raise ValueError(f"{path} exists already; choose another --json")
    if not path.parent.is_dir():
        raise ValueError(f"there is no directory {path.parent} for --json {path.name}")
    try:
        path.open("x").close()
        path.unlink()
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error.strerror}") from None


def write_json(path: Path, plan: Plan, settings: Settings) -> None:
    """All that was found, as a JSON object. A file that is there is not overwritten: that is a ValueError."""
    check_new(path)
    content = plan.to_json() | {"advice": [] if plan.fits else advice(plan, settings)}
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def _heading(plan: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    micro = plan.rows // plan.accumulate
    micro_batches = f" in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    return (
        f"{plan.model}: {plan.layers} layers, {plan.trained:,} of {plan.total:,} parameters trained\n"
        f"{plan.devices} x {plan.device}, mesh {mesh}\n"
        f"a step: {plan.rows:,} x {plan.tokens:,} tokens{micro_batches}, {micro // shards:,} x {plan.tokens:,} at "
        f"once on a device; compiled in {plan.compile_seconds:.0f} s\n"
    )


def _memory(plan: Plan) -> str:
    rows = [("memory of a device", ""), *((name, _size(size)) for name, size in plan.memory.items())]
    rows.append(("needed, as laid out", _size(plan.needed)))
    if plan.peak:
        rows.append(("at once, by the compiler", _size(plan.peak)))
    rows.append(("evaluation, in its turn", "-" if plan.evaluation is None else _size(plan.evaluation)))
    if plan.theory is not None:
        rows.append(("theory, in its turn", _size(plan.theory)))
    rows.append(("there are", _size(plan.room)))
    return _table(rows)


def _verdict(plan: Plan) -> str:
    missing = "; evaluation is not counted: how many choices questions have is in the data"
    if plan.fits:
        rest = missing if plan.evaluation is None else ""
        return f"fits: {100 * plan.most / plan.room:.0f} % of the memory{rest}"
    if plan.problem is None:
        return f"does not fit: {_size(plan.most - plan.room)} too much"
    return f"does not fit, the compiler says: {plan.problem:.300}"


def advice(plan: Plan, settings: Settings) -> list[str]:
    """What to change so that a plan fits, first where most of the memory goes.

    Sizes follow from shapes and shardings where a number is given; what only a compilation could tell is said so.
    """
    between_steps = [*_for_evaluation(plan, settings), *_for_theory(plan, settings)]
    if between_steps and plan.needed <= plan.room:
        return between_steps
    held = sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    weights, activations = _for_weights(plan, settings), _for_activations(plan, settings)
    return [
        *between_steps,
        *([*weights, *activations] if held > plan.memory["temporaries"] else [*activations, *weights]),
    ]


def _for_evaluation(plan: Plan, settings: Settings) -> list[str]:
    size, rows = plan.evaluation, settings.train.eval_batch_size
    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    if size is None or size <= plan.room or rows == parts:
        return []
    return [
        f"train.eval_batch_size below {rows:,}, a multiple of {parts}: evaluation needs {_size(size)}, the step "
        f"{_size(plan.needed)}"
    ]


def _for_theory(plan: Plan, settings: Settings) -> list[str]:
    if plan.theory is None or plan.theory <= plan.room:
        return []
    return [f"train.theory_every null: measuring needs {_size(plan.theory)}, the step {_size(plan.needed)}"]


def _for_weights(plan: Plan, settings: Settings) -> list[str]:
    frozen, trained = plan.memory["frozen weights"], plan.memory["trained"] + plan.memory["optimizer"]
    data, fsdp, is_full = plan.mesh["data"], plan.mesh["fsdp"], settings.method == "full"
    # Of adapters B is whole on every device, so that more parts split the base's weights alone.
    name, split = ("weights and optimizer", frozen + trained) if is_full else ("frozen weights", frozen)
    tips = []
    if trained > frozen:
        tips += _for_trained(plan, settings, trained)
    if data > 1 and split:
        tips.append(
            f"mesh.data 1 and mesh.fsdp {data * fsdp}: of the {name}, {_size(split)} now, a device then "
            f"holds about {_size(split / data)}"
        )
    if settings.model.param_dtype == "float32" and frozen:
        tips.append(
            f"model.param_dtype bfloat16: the frozen weights then take {_size(frozen / 2)} instead of "
            f"{_size(frozen)}"
        )
    return tips or [f"more devices for mesh.fsdp, which splits the weights: there are {plan.devices:,} now"]


def _for_trained(plan: Plan, settings: Settings, size: int) -> list[str]:
    """Where most of what is held is trained, or its moments."""
    if settings.method == "full":
        return [
            "method lora_plus: only adapters are trained, and the optimizer, "
            f"{_size(plan.memory['optimizer'])} now, holds moments of these alone (not compiled)"
        ]
    tips = []
    if settings.lora.modules_to_save:
        tips.append(
            f"fewer lora.modules_to_save: these are trained whole (of {_size(size)} with the optimizer)"
        )
    if settings.lora.rank > 1:
        tips.append(
            f"lora.rank below {settings.lora.rank}: adapters and their optimizer, {_size(size)} now, go in "
            "proportion"
        )
    return tips


def _for_activations(plan: Plan, settings: Settings) -> list[str]:
    rows = plan.rows // plan.accumulate // (plan.mesh["data"] * plan.mesh["fsdp"])
    tips = []
    if rows > 1:
        tips.append(
            f"train.accumulate {plan.accumulate * rows}: a device computes with 1 row at a time instead of {rows}; "
            f"of the temporaries, {_size(plan.memory['temporaries'])} now, most goes in proportion (not compiled)"
        )
    if settings.is_language and settings.model.remat != "full":
        tips.append("model.remat full: of a layer only its input is kept for the gradient (not compiled)")
    if (mesh := more_tensor(plan.mesh, plan.tensor_sizes)) is not None:
        sizes = ", ".join(f"mesh.{name} {size}" for name, size in mesh.items())
        tips.append(
            f"{sizes} and train.accumulate {plan.rows // (mesh['data'] * mesh['fsdp'])}: a device computes with "
            "fewer heads and less of the MLP, 1 row at a time (not compiled)"
        )
    fewer = ", or a smaller train.batch_size" if rows > 1 else ""
    return [*tips, f"data.max_length below {plan.tokens:,}{fewer}"]


def more_tensor(mesh: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The next mesh of as many devices with a larger tensor axis that divides a model's sizes, if there is one.

    >>> more_tensor({"data": 2, "fsdp": 3, "tensor": 1}, {"num_attention_heads": 12})
    {'data': 1, 'fsdp': 3, 'tensor': 2}
    >>> more_tensor({"data": 8, "fsdp": 1, "tensor": 1}, {"num_attention_heads": 3})
    """
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    largest = math.gcd(*sizes.values())
    for size in range(2 * tensor, largest + 1, tensor):
        of_data = math.gcd(data, size // tensor)
        of_fsdp = size // tensor // of_data
        if largest % size == 0 and fsdp % of_fsdp == 0:
            return {"data": data // of_data, "fsdp": fsdp // of_fsdp, "tensor": size}
    return None


def _work(plan: Plan) -> str:
    """FLOPs and bytes, the seconds that each would take alone, and the largest of these."""
    if plan.work is None:
        return "work was not counted: the programs for that need more memory than there is"
    rows = [("work of a device in a step", "", "ms alone")]
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
            f"FLOPs and bytes are too low: of {plan.work.loops} loops that the compiler left, one round is counted"
        )
    if plan.roofline:
        name, seconds = max(plan.roofline.items(), key=lambda item: item[1])
        rate = plan.rows * plan.tokens / seconds
        lines.append(f"roofline: {seconds:.3f} s a step, {rate:,.0f} tokens/s; {BOUND_NAMES[name]} bind")
    return "\n".join(lines)


def _communication(plan: Plan) -> list[str]:
    """The collectives by kind and size of group, and what a layer gathers."""
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
    rows = [("exchange between devices in a step", "devices", "number", "whole", "received")]
    for kind, group in sorted(counts, key=lambda key: -received[key]):
        key = (kind, group)
        rows.append((kind, f"{group:,}", f"{counts[key]:,}", _size(sizes[key]), _size(received[key])))
    return ["", _table(rows), "", _table(_largest(plan.collectives))]


def _largest(all_collectives: Sequence[Collective]) -> list[tuple[str, ...]]:
    """The groups of equal collectives that receive most, and the largest reductions beside these."""
    times: Counter[Collective] = Counter()
    for collective in all_collectives:
        times[collective._replace(where="", times=1)] += collective.times
    groups = sorted(times, key=lambda collective: -times[collective] * collective.wire_bytes)
    reductions = [
        collective
        for collective in groups[LARGEST_SHOWN:]
        if collective.kind in ("all-reduce", "reduce-scatter")
    ]
    rows = [("largest of them", "arrays", "devices", "number", "whole, each", "received")]
    for collective in [*groups[:LARGEST_SHOWN], *reductions[:REDUCTIONS]]:
        received = times[collective] * collective.wire_bytes
        cells = (f"{collective.group:,}", f"{times[collective]:,}", _size(collective.bytes), _size(received))
        rows.append((collective.kind, _arrays(collective.shape), *cells))
    return rows


def _arrays(shape: str) -> str:
    """A tuple's arrays, the different ones with their number, as far as they fit on a line.

    >>> _arrays("f32[3,8], f32[8,3], f32[3,8]")
    '2 f32[3,8], f32[8,3]'
    """
    kinds = Counter(shape.split(", ")).items()
    texts = [array if number == 1 else f"{number} {array}" for array, number in kinds]
    rest = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
    return ", ".join(texts[:2]) + rest


def _weight_traffic(plan: Plan, settings: Settings) -> list[str]:
    """How often the frozen weights, split over `fsdp`, come in: forward and backward need them once each."""
    frozen = (plan.total - plan.trained) * jnp.dtype(settings.model.param_dtype).itemsize
    if not frozen or plan.mesh["fsdp"] == 1 or plan.mesh["tensor"] > 1:
        return []
    has_slivers = bool(_weight_reductions(plan))
    kinds = ("all-gather", "collective-permute", *(["all-reduce"] if has_slivers else []))
    received = sum(c.times * c.wire_bytes for c in plan.collectives if c.kind in kinds)
    often = received / plan.accumulate / frozen
    micro = " a micro-batch" if plan.accumulate > 1 else ""
    by = "gathers, permutes and all-reduces" if has_slivers else "gathers and permutes"
    return [
        f"by {by} received: {often:.2f} x the frozen weights{micro}; 2 is once for the forward and once for the "
        "backward pass"
    ]


def _weight_reductions(plan: Plan) -> list[str]:
    """A line where all-reduces carry weights: XLA gathers by them what it has cut into very many parts."""
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    reduced = sum(c.times * c.bytes for c in plan.collectives if c.kind == "all-reduce")
    gradients = 4 * plan.trained * plan.accumulate  # float32, and all of them once a micro-batch at most
    # With a tensor axis activations are reduced too, and as many bytes are as they must be.
    if plan.mesh["tensor"] > 1 or fsdp == 1 or reduced < 10 * gradients:
        return []
    factor = next(n for n in range(2, fsdp + 1) if fsdp % n == 0)
    return [
        f"all-reduces carry {_size(reduced)}, and the gradients are {_size(gradients)} at most: XLA gathers "
        "weights by them, which receives twice what gathers do; fewer parts may help: "
        f"mesh.data {factor * data} and mesh.fsdp {fsdp // factor} (not compiled)"
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
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
    """Bytes with the unit that leaves one to three digits before the point.

    >>> _size(0), _size(1234.5), _size(16e9)
    ('0 B', '1.23 kB', '16.00 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
