"""Renders a plan as text: tables, whether it fits, and what to change."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from .._utils.atomic import to_json, write_text
from ..settings.schema import Settings
from .devices import GPUS, MAX_FRACTION, MEM_FRACTION, Gpu, memory_fraction
from .fits import COMPILED_FOR, Fit, Fits
from .hlo import Collective
from .plan import Plan
from .search import Search, Trial

LARGEST_SHOWN, REDUCTIONS = 5, 3
"""Number of collectives listed separately: the largest of all, and further reductions."""
BOUND_NAMES = {"compute": "FLOPs", "memory": "bytes accessed", "network": "bytes received"}
_BOUNDS = {"compute": "compute-bound", "memory": "memory-bound", "network": "network-bound"}


def format_plan(plan: Plan, settings: Settings) -> str:
    """The full text of a plan, for the console."""
    tips = [] if plan.fits else [f"- {line}" for line in advice(plan, settings)]
    parts = [_heading(plan), _memory(plan), _verdict(plan, settings), *tips, "", _work(plan)]
    return "\n".join([*parts, *_communication(plan), *_weight_traffic(plan, settings), *_estimates(plan)])


def write_json(path: Path, plan: Plan, settings: Settings) -> None:
    """Writes the plan and its advice as a JSON object; raises ValueError if the file exists."""
    content = plan.to_json() | {"advice": [] if plan.fits else advice(plan, settings)}
    write_text(path, to_json(content, indent=1) + "\n", new=True)


def format_search(search: Search, settings: Settings, command: Sequence[str]) -> str:
    """The layouts that a search counted or compiled, those it skipped, and the command of the fastest that fits."""
    times = tuple(f"{name}, ms" for name in BOUND_NAMES)
    rows = [("data x fsdp x tensor", "micro-batches", "remat", "needed", *times, "s", "")]
    tried = [trial for trial in search.trials if trial.work is not None or trial.plan is not None]
    tried.sort(key=lambda trial: (trial.plan is None, not trial.fits, trial.seconds))
    lines = [_table([*rows, *(_trial_row(search, trial) for trial in tried)]), ""]
    left = [trial for trial in search.trials if trial.plan is None]
    counts = Counter(trial.problem or "not compiled" for trial in left)
    lines += [f"{number:,} of {len(search.trials):,} layouts: {name}" for name, number in counts.items()]
    if search.rejected is not None:
        lines.append(f"training rejects the settings as they are: {search.rejected}")
    start, best = search.start, search.best
    if best is not None:
        lines.append(f"fastest layout that compiled and fits: {best.seconds:.3f} s per step")
        if start is not None and start.plan is not None:
            lines[-1] += f", {best.seconds / start.seconds:.2f} x that of the settings as they are"
        lines += ["", search_command(search, settings, command) or "", ""]
    return "\n".join(lines)


def search_command(search: Search, settings: Settings, command: Sequence[str]) -> str | None:
    """The command line that trains with the fastest layout; None if none fits."""
    if search.best is None:
        return None
    return shlex.join([*command, *search.best.layout.options(settings, search.current)])


def explain_no_fit(search: Search) -> str:
    """Why a search found no layout that fits."""
    if not search.complete:
        return "the search was interrupted before a layout was known to fit"
    compiled = [trial.needed for trial in search.trials if trial.plan is not None]
    least = min(compiled or [trial.needed for trial in search.trials])
    return (
        f"no layout that was tried fits: each needs at least {_size(least)} per device; use a larger topology, a "
        "smaller data.max_length, or for the weights model.param_dtype bfloat16 or model.quantize"
    )


def write_search(path: Path, search: Search, settings: Settings, command: Sequence[str]) -> None:
    """Writes a search's command, plan and layouts as a JSON object; raises ValueError if the file exists."""
    best = search.best
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
        "plan": None if best is None or best.plan is None else best.plan.to_json(),
        "layouts": layouts,
    }
    write_text(path, to_json(content, indent=1) + "\n", new=True)


def format_fits(fits: Fits, settings: Settings) -> str:
    """On which GPUs a step fits: one row per GPU and kind of weights, one column per number of GPUs."""
    counts = list(fits.settings)
    lines = [
        f"{settings.model.path}: which GPUs does a step of {settings.data.max_length:,} tokens per row fit on?"
    ]
    forms = {
        quantize: settings.model.param_dtype if quantize == "none" else quantize
        for quantize in dict.fromkeys(fit.quantize for fit in fits.fits)
    }
    needed = {
        (fit.quantize, fit.number): f"{'over ' if fit.problem else ''}{_size(fit.needed)}"
        for fit in fits.fits
        if fit.gpu == COMPILED_FOR
    }
    names = (f"needed per GPU, {form}" for form in forms.values())
    rows = [("GPUs", "rows per step", "micro-batches", "rows per GPU at a time", *names)]
    for count, spread in fits.settings.items():
        train = spread.train
        at_once = train.batch_size // train.accumulate // count
        sizes = (needed[quantize, count] for quantize in forms)
        rows.append((str(count), f"{train.batch_size:,}", f"{train.accumulate:,}", f"{at_once:,}", *sizes))
    lines += [_table(rows), ""]
    cells = {(fit.quantize, fit.gpu, fit.number): _fit_cell(fit) for fit in fits.fits}
    table = [("GPU", "memory", "weights", *(f"{count} GPU{'s' * (count > 1)}" for count in counts))]
    for quantize, name in dict.fromkeys((fit.quantize, fit.gpu) for fit in fits.fits):
        answers = (cells[quantize, name, count] for count in counts)
        table.append((name, _size(GPUS[name].memory), forms[quantize], *answers))
    lines += [
        _table(table),
        f"left of {100 * MAX_FRACTION:.0f} % of the memory; the rest is for the CUDA context, NCCL and CUDA graphs",
    ]
    if any("*" in cell for cell in cells.values()):
        lines.append(
            f"* with {_reserve(MAX_FRACTION)}; as set, JAX reserves {100 * memory_fraction():.0f} % of the memory"
        )
    if settings.is_language and settings.model.remat != "full":
        lines.append(f"model.remat is {settings.model.remat}; full needs less memory")
    exact = sum(fit.exact for fit in fits.fits)
    lines.append(
        f"{exact} of {len(fits.fits)} answers are from a program for that GPU, the others, which are not close, "
        f"from one for {COMPILED_FOR}; took {fits.seconds / 60:.1f} min"
    )
    return "\n".join(lines)


def _fit_cell(fit: Fit) -> str:
    if fit.needed > fit.limit:
        return f"no, {_size(fit.needed - fit.limit)} too much"
    if fit.problem is not None:
        return "no, the compiler ran out of memory"
    return f"yes{'' if fit.needed <= fit.available else '*'}, {_size(fit.limit - fit.needed)} left"


def write_fits(path: Path, fits: Fits) -> None:
    """Writes the answers as a JSON object; raises ValueError if the file exists."""
    answers = [fit._asdict() | {"fits": fit.fits} for fit in fits.fits]
    write_text(path, to_json({"fits": answers, "seconds": fits.seconds}, indent=1) + "\n", new=True)


def _trial_row(search: Search, trial: Trial) -> tuple[str, ...]:
    layout = trial.layout
    result = "counted" if trial.plan is None else trial.problem or "fits"
    if trial is search.best:
        result += ", fastest"
    elif layout == search.current:
        result += ", the settings as they are"
    if trial.work is not None and trial.work.loops:
        result += ", bytes too low"
    return (
        " x ".join(map(str, layout.mesh)),
        str(layout.accumulate),
        layout.remat,
        ("> " if trial.plan is None else "") + _size(trial.needed),
        *(f"{1e3 * seconds:.1f}" for seconds in trial.times.values()),
        f"{trial.seconds:.3f}",
        result,
    )


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
    part = f" ({100 * plan.room / plan.chip.memory:.0f} % of the GPU's)" if isinstance(plan.chip, Gpu) else ""
    rows.append((f"available{part}", _size(plan.room)))
    return _table(rows)


def _estimates(plan: Plan) -> list[str]:
    """What a plan for a GPU estimates, and what it leaves out."""
    if not isinstance(plan.chip, Gpu):
        return []
    memory = plan.chip.memory
    return [
        "",
        "estimates: temporaries may be a few percent off, as XLA selects matmul kernels by timing them on the GPU; "
        "the workspace of cuBLAS and cuDNN is by rule, not by the libraries; bytes accessed are an upper bound",
        f"available: JAX reserves {100 * memory_fraction():.0f} % of {_size(memory)}; "
        f"{_reserve(MAX_FRACTION)} makes it {_size(MAX_FRACTION * memory)}. The rest is for the CUDA context, NCCL "
        "buffers and CUDA graphs, which are not counted",
    ]


def _reserve(fraction: float) -> str:
    return f"{MEM_FRACTION}={fraction}"


_UNCOUNTED = {
    "multiple_choice": "; evaluation is not counted, as its rows depend on the data",
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
    shards, rows = plan.mesh["data"] * plan.mesh["fsdp"], settings.train.eval_batch_size
    between_steps = []
    if plan.evaluation is not None and plan.evaluation > plan.room and rows > shards:
        between_steps.append(
            f"train.eval_batch_size below {rows:,}, a multiple of {shards}: evaluation needs "
            f"{_size(plan.evaluation)}, the step {_size(plan.needed)}"
        )
    if plan.theory is not None and plan.theory > plan.room:
        between_steps.append(
            f"train.theory_every null: theory metrics need {_size(plan.theory)}, the step {_size(plan.needed)}"
        )
    if between_steps and plan.needed <= plan.room:
        return _advise_reservation(plan) + between_steps
    held = sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    weights, activations = _advise_weights(plan, settings), _advise_activations(plan, settings)
    step = weights + activations if held > plan.memory["temporaries"] else activations + weights
    return _advise_reservation(plan) + between_steps + step + _advise_gpus(plan)


def _advise_reservation(plan: Plan) -> list[str]:
    """The environment variable with which a step fits that needs more than JAX reserves of a GPU."""
    if not isinstance(plan.chip, Gpu) or not plan.room < plan.most <= MAX_FRACTION * plan.chip.memory:
        return []
    return [
        f"{_reserve(MAX_FRACTION)} in the environment: it fits in {_size(MAX_FRACTION * plan.chip.memory)} of the "
        f"GPU's {_size(plan.chip.memory)}"
    ]


def _advise_gpus(plan: Plan) -> list[str]:
    """How many GPUs of this kind, and which larger one, have the memory that the step needs as it is."""
    if not isinstance(plan.chip, Gpu):
        return []
    frozen, fsdp, tips = plan.memory["frozen weights"], plan.mesh["fsdp"], []
    for more in (2, 4, 8, 16, 32):
        if plan.needed - frozen + frozen / more <= plan.room:
            tips.append(
                f"{more * plan.devices} GPUs with mesh.fsdp {more * fsdp} and as many rows per GPU: a device holds "
                f"{_size(frozen / more)} of the frozen weights instead of {_size(frozen)} (not compiled)"
            )
            break
    larger = [gpu for gpu in GPUS.values() if gpu.memory > plan.chip.memory and gpu.available >= plan.most]
    if larger:
        tips.append(f"a larger GPU: {', '.join(gpu.name for gpu in larger)}")
    return tips


def _advise_weights(plan: Plan, settings: Settings) -> list[str]:
    frozen, trained = plan.memory["frozen weights"], plan.memory["trained"] + plan.memory["optimizer"]
    data, fsdp, is_full = plan.mesh["data"], plan.mesh["fsdp"], settings.method == "full"
    # B is replicated on every device, so with adapters a larger fsdp axis shards only the base weights.
    name, split = ("weights and optimizer", frozen + trained) if is_full else ("frozen weights", frozen)
    tips = []
    if trained > frozen:
        takes = f"weights that train and the optimizer's moments take {_size(trained)}"
        if is_full:
            tips.append(f"method lora_plus: {takes}, those of adapters less (not compiled)")
        elif settings.lora.modules_to_save:
            tips.append(f"fewer lora.modules_to_save, which train all their weights: {takes}")
        elif settings.lora.rank > 1:
            tips.append(f"lora.rank below {settings.lora.rank}: {takes}, in proportion to the rank")
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
    if not tips and not isinstance(plan.chip, Gpu):
        tips.append(f"more devices for mesh.fsdp, which shards the weights (devices now: {plan.devices:,})")
    if settings.model.quantize == "none" and not is_full and frozen:
        bits = 8 * jnp.dtype(settings.model.param_dtype).itemsize
        tips.append(
            f"model.quantize nf4: a weight of the layers takes 4.13 bits instead of {bits} (not compiled)"
        )
    return tips


def _advise_activations(plan: Plan, settings: Settings) -> list[str]:
    rows = plan.rows // plan.accumulate // (plan.mesh["data"] * plan.mesh["fsdp"])
    tips = []
    if settings.is_language and settings.model.remat != "full":
        tips.append("model.remat full: keeps only each layer's input for the backward pass (not compiled)")
    if rows > 1:
        tips.append(
            f"train.accumulate {plan.accumulate * rows}: a device processes 1 row at a time instead of "
            f"{rows}; most of the temporaries, {_size(plan.memory['temporaries'])} now, shrink in proportion "
            "(not compiled)"
        )
    fewer = ", or a smaller train.batch_size" if rows > 1 else ""
    return [*tips, f"data.max_length below {plan.tokens:,}{fewer}"]


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
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    times: Counter[Collective] = Counter()
    for one in plan.collectives:
        amounts = (one.times, one.times * one.bytes, one.times * one.wire_bytes)
        key = one.kind, _devices(one)
        sums[key] = [a + b for a, b in zip(sums[key], amounts, strict=True)]
        times[one._replace(where="", times=1)] += one.times
    rows = [("collectives per step", "devices", "count", "full size", "received")]
    for (kind, devices), (count, size, received) in sorted(sums.items(), key=lambda item: -item[1][2]):
        rows.append((kind, devices, f"{count:,}", _size(size), _size(received)))
    groups = sorted(times, key=lambda one: -times[one] * one.wire_bytes)
    # When only adapters train, what is reduced should have the rank as a side: any other is a surprise to see.
    reductions = [one for one in groups[LARGEST_SHOWN:] if one.kind in ("all-reduce", "reduce-scatter")]
    largest = [("largest collectives", "arrays", "devices", "count", "full size, each", "received")]
    for one in [*groups[:LARGEST_SHOWN], *reductions[:REDUCTIONS]]:
        received = _size(times[one] * one.wire_bytes)
        cells = (_devices(one), f"{times[one]:,}", _size(one.bytes), received)
        largest.append((one.kind, _arrays(one.shape), *cells))
    return ["", _table(rows), "", _table(largest)]


def _devices(one: Collective) -> str:
    return f"{one.group:,}" + (f" on {one.hosts:,} hosts" if one.hosts > 1 else "")


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
    """How often a step receives the weights sharded over `fsdp`, and a line if all-reduces carry them."""
    frozen = (plan.total - plan.trained) * jnp.dtype(settings.model.param_dtype).itemsize
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    # A tensor axis also communicates activations, so there the bytes say nothing about weights.
    if not frozen or fsdp == 1 or plan.mesh["tensor"] > 1:
        return []
    names, warnings = {"all-gather": "all-gathers", "collective-permute": "permutes"}, []
    reduced = sum(one.times * one.bytes for one in plan.collectives if one.kind == "all-reduce")
    gradients = 4 * plan.trained * plan.accumulate  # float32, at most once per micro-batch
    if reduced >= 10 * gradients:  # XLA gathers by all-reduce what is sharded into many parts
        factor = next(n for n in range(2, fsdp + 1) if fsdp % n == 0)
        names["all-reduce"] = "all-reduces"
        warnings.append(
            f"all-reduces carry {_size(reduced)}, but the gradients at most {_size(gradients)}: XLA gathers "
            "weights by all-reduce, which receives twice as much as all-gather; fewer shards may help: "
            f"mesh.data {factor * data} and mesh.fsdp {fsdp // factor} (not compiled)"
        )
    received = sum(one.times * one.wire_bytes for one in plan.collectives if one.kind in names)
    *first, last = names.values()
    micro = " per micro-batch" if plan.accumulate > 1 else ""
    return [
        f"received by {', '.join(first)} and {last}: {received / plan.accumulate / frozen:.2f} x the frozen "
        f"weights{micro}; 2 means once each in the forward and backward pass",
        *warnings,
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
