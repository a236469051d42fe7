"""Searches for the fastest layout of a training step that fits: mesh, micro-batches, remat, attention, loss chunks.

A best-first search. Each layout starts with lower bounds on its memory and time, from shapes alone. The layout with
the smallest bound on its time is counted: FLOPs and bytes come from programs of one and of two layers, and bound
those layouts too that cannot need less. When it is the smallest again, its step is compiled, which gives its memory
and communication. The search ends when no layout can be faster than the fastest that compiled and fits.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.extend.core import ClosedJaxpr, Jaxpr

from ..models.decoder import head_kernel
from ..settings.choices import Attention, Remat
from ..settings.schema import Settings
from ..step.sharding import AXES, make_mesh, make_shardings
from ..tasks.causal_lm import head_is_frozen
from ..training.setup import params_of
from .plan import Plan, Work, check_layout, check_length, count_work, layers_of, make_model, plan_for
from .programs import LoweredStep, local_bytes, plan_step
from .tpu import Chip

SETTINGS = {
    "data": "mesh.data",
    "fsdp": "mesh.fsdp",
    "tensor": "mesh.tensor",
    "accumulate": "train.accumulate",
    "remat": "model.remat",
    "attention": "model.attention",
    "loss_chunk": "model.loss_chunk",
}
"""The settings that a search changes, by field of `Layout`. A step computes the same with any of them, except for
rounding and for the masks of dropout, which differ between micro-batches."""
MARGIN = 0.01
"""The search ends when no other layout can be faster by more than this fraction."""
TOO_LARGE = "needs more memory than available"
UNCOUNTED = "the programs that count its work need more memory than available"
LOGIT_ARRAYS = 4
"""At most so many float32 arrays of a chunk's logits exist together: logits, probabilities and their gradients."""


class Layout(NamedTuple):
    """How a step is split over devices and time; see `SETTINGS`."""

    data: int
    fsdp: int
    tensor: int
    accumulate: int
    remat: Remat
    attention: Attention
    loss_chunk: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the mesh's axes."""
        return self[:3]

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh)

    @property
    def kind(self) -> "Layout":
        """A key for layouts that need the same FLOPs and bytes, but for chunks of the loss.

        How many parts `fsdp` splits the weights into makes no difference, as long as it splits them.
        """
        return self._replace(data=self.data * self.fsdp, fsdp=min(self.fsdp, 2), loss_chunk=0)

    def apply(self, settings: Settings) -> Settings:
        """The settings with this layout; raises ValueError if they contradict it."""
        sections: dict[str, dict[str, Any]] = {}
        for field, name in SETTINGS.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = getattr(self, field)
        changed = {
            name: dataclasses.replace(getattr(settings, name), **values) for name, values in sections.items()
        }
        return dataclasses.replace(settings, **changed)

    def options(self, settings: Settings, current: "Layout") -> list[str]:
        """Command-line options that change the settings, whose layout is `current`, to this one."""
        words = []
        for field, name in SETTINGS.items():
            section, _, key = name.partition(".")
            is_same_mesh = section == "mesh" and self.mesh == current.mesh  # the settings may say -1
            if not is_same_mesh and getattr(self, field) != getattr(getattr(settings, section), key):
                words += [f"--{name}", str(getattr(self, field))]
        return words

    def needs_memory_of(self, other: "Layout") -> bool:
        """Whether a step needs at least as much memory as another's, except for the loss's logits."""
        return (
            self.size == other.size
            and (self.tensor, self.attention) == (other.tensor, other.attention)
            and self.fsdp <= other.fsdp
            and self.accumulate <= other.accumulate
            and get_args(Remat).index(self.remat) <= get_args(Remat).index(other.remat)
        )

    def needs_flops_of(self, other: "Layout") -> bool:
        """Whether a device needs at least as many FLOPs as in another layout.

        The mesh splits the same FLOPs evenly, but a larger tensor axis repeats what it does not split.
        """
        return (
            self.size == other.size
            and (self.remat, self.attention) == (other.remat, other.attention)
            and self.tensor % other.tensor == 0
        )


@dataclasses.dataclass
class Trial:
    """What a search knows of a layout.

    Attributes:
      layout: the layout.
      needed: lower bound on the bytes that a device needs.
      times: lower bounds on the seconds of a step, by `"compute"`, `"memory"` and `"network"`.
      work: FLOPs and bytes of a device, if counted.
      plan: the plan, if compiled.
      problem: why the layout is out of the question, if it is.
    """

    layout: Layout
    needed: float
    times: dict[str, float]
    work: Work | None = None
    plan: Plan | None = None
    problem: str | None = None

    @property
    def seconds(self) -> float:
        """Lower bound on the seconds of a step; with a plan, its roofline."""
        return max(self.times.values())


class Shape(NamedTuple):
    """Sizes of a traced step over all devices, with one micro-batch.

    Attributes:
      flops: FLOPs of its matrix products.
      saved: bytes that the layers save for the backward pass.
      carried: bytes that a layer passes on to the next.
    """

    flops: float
    saved: int
    carried: int


class Search:
    """A search for the layout with the smallest roofline time that fits, at the same tokens per step.

    Attributes:
      current: the layout of the settings.
      rejected: why training would reject that layout; None if it would not.
      trials: a trial of every layout that training would accept.
      complete: whether the search ended by itself.
    """

    def __init__(
        self, settings: Settings, chip: Chip, devices: Sequence[Any], fixed: Collection[str] = ()
    ) -> None:
        """Lists the layouts and their bounds.

        Args:
          settings: settings of the run, as for `make_plan`.
          chip: figures of the devices.
          devices: devices to compile for; every layout but the settings' own uses all of them.
          fixed: names of settings that stay as they are, such as `"model.remat"`.

        Raises:
          ValueError, OSError: settings that training would reject with any layout.
        """
        self._settings, self._chip, self._devices = settings, chip, devices
        self._base, self._data = make_model(settings)
        check_length(settings, self._base)
        model, train = settings.model, settings.train
        own = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
        data, fsdp, tensor = own.devices.shape
        self.current = Layout(
            data, fsdp, tensor, train.accumulate, model.remat, model.attention, model.loss_chunk
        )
        self.rejected: str | None = None
        self.complete = False
        self._counted: dict[str, Work | None] = {}
        self._bytes: dict[Remat, dict[Layout, float]] = {}
        self._vocabulary: int | None = None
        layouts = list(self._layouts({field for field, name in SETTINGS.items() if name in fixed}))
        if not layouts:
            raise ValueError(self.rejected or f"no mesh of {len(devices)} devices splits the batch")
        self.trials = self._bound(layouts)

    @property
    def start(self) -> Trial | None:
        """The trial of the settings' own layout."""
        return next((trial for trial in self.trials if trial.layout == self.current), None)

    @property
    def best(self) -> Trial | None:
        """The fastest layout that compiled and fits."""
        fitting = [trial for trial in self.trials if trial.plan is not None and trial.problem is None]
        return min(fitting, key=lambda trial: trial.seconds, default=None)

    def run(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Compiles the settings' own layout and then searches; an interrupt ends it with what is known by then.

        Args:
          report: called with a line on each program that was compiled.
        """
        try:
            while (trial := self._next()) is not None:
                self._advance(trial, report)
            self.complete = True
        except KeyboardInterrupt:
            report("interrupted")

    def _advance(self, trial: Trial, report: Callable[[str], None]) -> None:
        """Counts a trial, or compiles one that is counted."""
        is_counted = trial.work is not None
        if is_counted:
            self._compile(trial)
        else:
            self._count(trial)
        report(f"{'compiled' if is_counted else 'counted'} {describe(trial)}")

    def _next(self) -> Trial | None:
        """First that of the settings' own layout, then the one with the smallest bound that may beat the best.

        A counted layout that is about as fast comes before it, that of the smallest memory first: if it fits and
        its communication takes no longer, it ends the search.
        """
        limit = math.inf if self.best is None else (1 - MARGIN) * self.best.seconds
        left = [trial for trial in self.trials if trial.plan is None and trial.problem is None]
        if self.start in left:
            return self.start
        left = [trial for trial in left if trial.seconds < limit]
        least = min((trial.seconds for trial in left), default=0.0)
        near = [t for t in left if t.work is not None and (1 - MARGIN) * t.seconds <= least]
        if near:
            return min(near, key=lambda trial: trial.needed)
        return min(left, key=lambda trial: trial.seconds, default=None)

    def _count(self, trial: Trial) -> None:
        """Counts the work of a trial and of those of its kind, for the one that needs least of them."""
        alike = [other for other in self.trials if other.layout.kind == trial.layout.kind]
        layout = max((t.layout for t in alike), key=lambda layout: (layout.loss_chunk, layout.fsdp))
        mesh = make_mesh(*layout.mesh, devices=self._devices)
        settings = layout.apply(self._settings)
        work = count_work(settings, make_model(settings)[0], self._data, mesh, self._counted)
        for other in alike:
            other.work = work
            if work is None:
                other.problem = UNCOUNTED
        self._raise_times(layout, work)

    def _compile(self, trial: Trial) -> None:
        """Plans a trial; if it does not fit, neither do trials that need at least as much memory."""
        trial.plan = plan = plan_for(
            trial.layout.apply(self._settings), self._chip, self._devices, self._counted
        )
        trial.work, trial.needed = plan.work, plan.needed
        # The count is too low where loops remain, and may be below the bound by matmuls that only it can share.
        is_complete = plan.work is not None and not plan.work.loops
        trial.times = plan.roofline if is_complete else _larger(trial.times, plan.roofline)
        if not plan.fits:
            trial.problem = "does not fit"
        elif plan.work is None:
            trial.problem = UNCOUNTED
        for other in self.trials:
            if other.plan is None and other.layout.needs_memory_of(trial.layout):
                saved = max(0, self._most_logit_bytes(trial.layout) - self._most_logit_bytes(other.layout))
                other.needed = max(other.needed, plan.needed - saved)
        self._drop_large()

    def _raise_times(self, layout: Layout, work: Work | None) -> None:
        """Raises the bounds of all layouts by the counted work of one."""
        if work is None or layout.size != len(self._devices):
            return
        counts = self._bytes.setdefault(layout.remat, {})
        counts[layout.kind] = work.bytes
        least = functools.cache(functools.partial(least_bytes, counts))
        for trial in self.trials:
            if trial.layout.needs_flops_of(layout):
                trial.times = _larger(trial.times, {"compute": work.flops / self._chip.flops})
            if trial.layout.remat == layout.remat and trial.layout.size == layout.size:
                kind = trial.layout.kind
                seconds = (counts[kind] if kind in counts else least(kind)) / self._chip.hbm_rate
                trial.times = _larger(trial.times, {"memory": seconds})

    def _drop_large(self) -> None:
        for trial in self.trials:
            if trial.plan is None and trial.problem is None and trial.needed > self._chip.hbm_bytes:
                trial.problem = TOO_LARGE

    def _layouts(self, fixed: Collection[str]) -> Iterator[Layout]:
        """The settings' own layout, and all others of the devices that keep the fixed fields."""
        settings, current, count = self._settings, self.current, len(self._devices)
        # "auto" is one of the others.
        attentions = dict.fromkeys([current.attention, *(n for n in get_args(Attention) if n != "auto")])
        choices = {
            field: [getattr(current, field)] if field in fixed else values
            for field, values in {
                "data": _divisors(count),
                "fsdp": _divisors(count),
                "tensor": _divisors(count),
                "accumulate": _divisors(settings.train.batch_size),
                "remat": get_args(Remat) if settings.is_language else [current.remat],
                "attention": attentions if settings.is_language else [current.attention],
            }.items()
        }
        meshes = [current.mesh]
        meshes += [
            mesh
            for mesh in itertools.product(choices["data"], choices["fsdp"], choices["tensor"])
            if math.prod(mesh) == count and mesh != current.mesh
        ]
        for sizes in meshes:
            mesh = make_mesh(*sizes, devices=self._devices)
            for accumulate in choices["accumulate"]:
                layout = current._replace(**dict(zip(AXES, sizes, strict=True)), accumulate=accumulate)
                try:
                    check_layout(layout.apply(settings), self._base, mesh)
                except ValueError as error:
                    if layout == current:
                        self.rejected = str(error)
                    continue
                for remat, attention in itertools.product(choices["remat"], choices["attention"]):
                    for chunk in self._chunks(layout) if "loss_chunk" not in fixed else [current.loss_chunk]:
                        yield layout._replace(remat=remat, attention=attention, loss_chunk=chunk)

    def _chunks(self, layout: Layout) -> list[int]:
        """Tokens per chunk of the loss: the settings', and by factors of 4 up to all tokens of a micro-batch."""
        own, rows = self.current.loss_chunk, self._settings.train.batch_size // layout.accumulate
        tokens = rows * self._settings.data.max_length // (layout.data * layout.fsdp)
        smaller = [size for n in range(-1, 12) if 1 <= (size := int(own * 4.0**n)) < tokens]
        return list(dict.fromkeys([own, *smaller, tokens])) if self._settings.is_language else [own]

    def _bound(self, layouts: Sequence[Layout]) -> list[Trial]:
        """Trials with bounds from shapes alone, in the order in which to prefer equal ones.

        Attention implementations that give the same program count as one, and so do sizes of unused chunks.
        """
        shapes: dict[tuple[str, str], Shape] = {}
        texts: set[str] = set()
        step: Any = None
        first = layouts[0]._replace(accumulate=1)
        mesh = make_mesh(*first.mesh, devices=self._devices)
        attentions = dict.fromkeys([self.current.attention, *(layout.attention for layout in layouts)])
        remats = get_args(Remat) if self._settings.is_language else (self.current.remat,)
        for attention, remat in itertools.product(attentions, remats):
            applied = first._replace(remat=remat, attention=attention).apply(self._settings)
            try:
                check_layout(applied, self._base, mesh)
                step = plan_step(applied, make_model(applied)[0], self._data, mesh)
            except ValueError:  # an implementation that does not support the model or the devices
                if attention == self.current.attention:
                    raise
                continue
            if (text := step.lowered.as_text()) not in texts:
                texts.add(text)
                shapes[remat, attention] = shape_of(step.jaxpr, layers_of(self._base))
        self._vocabulary = _frozen_vocabulary(step) if self._settings.is_language else None
        sizes = {mesh: self._weights(mesh, step) for mesh in dict.fromkeys(layout.mesh for layout in layouts)}
        trials = {}
        for layout in layouts:
            if self._vocabulary is None:
                layout = layout._replace(loss_chunk=self.current.loss_chunk)
            shape = shapes.get((layout.remat, layout.attention))
            if shape is not None and layout not in trials:
                # XLA may find out that it recomputes what it still has, so remat adds no FLOPs for certain.
                flops = min(s.flops for (_, kind), s in shapes.items() if kind == layout.attention)
                bounds = self._first_bound(layout, shape._replace(flops=flops), *sizes[layout.mesh])
                trials[layout] = bounds
        ordered = sorted(trials.values(), key=lambda pair: pair[0])
        return [trial for _, trial in ordered]

    def _first_bound(
        self, layout: Layout, shape: Shape, held: int, gathered: int
    ) -> tuple[tuple[float, ...], Trial]:
        """A trial with its bounds, and a key to order it by.

        A device needs its share of what is saved. It reads the weights of the layers forward and backward in each
        micro-batch, and receives what others hold of them at least once. A tensor axis all-reduces what a layer
        passes on, twice forward and twice backward (arXiv 1909.08053, section 3).
        """
        chip, layers = self._chip, layers_of(self._base)
        reads = 2 * layout.accumulate * gathered + 2 * shape.saved / layout.size
        reduced = 8 * layers * shape.carried * (layout.tensor - 1) / layout.size
        received = layout.accumulate * gathered * (1 - 1 / layout.fsdp)
        times = {
            "compute": shape.flops / layout.size / chip.flops,
            "memory": reads / chip.hbm_rate,
            "network": (received + reduced) / chip.ici_rate,
        }
        needed = held + shape.saved / layout.size / layout.accumulate
        problem = TOO_LARGE if needed > chip.hbm_bytes else None
        order = (times["memory"] + reduced / chip.ici_rate, needed, -layout.loss_chunk)
        return order, Trial(layout, needed, times, problem=problem)

    def _weights(self, sizes: tuple[int, int, int], step: LoweredStep) -> tuple[int, int]:
        """Bytes that a device holds between steps, and those of the layers that it gathers over `fsdp`."""
        mesh = make_mesh(*sizes, devices=self._devices)
        parts, state = step.parts, step.state
        shardings = make_shardings(mesh, state, parts.frozen, specs=parts.specs, rules=parts.base.rules)
        held = local_bytes(state.trainable, shardings.state.trainable)
        held += local_bytes(state.opt_state, shardings.state.opt_state)
        held += local_bytes(parts.frozen, shardings.frozen)
        width, gathered = jnp.dtype(self._settings.model.dtype).itemsize, 0
        for leaf, sharding in zip(
            jax.tree.leaves(parts.frozen), jax.tree.leaves(shardings.frozen), strict=True
        ):
            if leaf.shape[:1] == (layers_of(self._base),) and "fsdp" in sharding.spec:
                local = math.prod(sharding.shard_shape(leaf.shape)) * min(width, leaf.dtype.itemsize)
                gathered += local * mesh.shape["fsdp"]
        return held, gathered

    def _most_logit_bytes(self, layout: Layout) -> float:
        """Upper bound on the bytes of logits that the loss has in memory at a time, by `loss_chunk`."""
        return 4 * LOGIT_ARRAYS * (self._vocabulary or 0) * layout.loss_chunk


def describe(trial: Trial) -> str:
    """A layout and what is known of it, on one line."""
    values = zip(SETTINGS.values(), trial.layout, strict=True)
    words = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in values)
    return f"{words}: {trial.problem or f'{trial.seconds:.3f} s'}"


def least_bytes(counts: Mapping[Layout, float], layout: Layout) -> float:
    """A lower bound on the bytes that a device reads and writes, from the counts of layouts with the same remat.

    With t the size of the tensor axis and m the micro-batches, the bytes are s + r t + w m / t + g m / t, all
    unknown and not negative: activations that t splits, s, for each implementation of attention; those that every
    device repeats, r, for its t times as many rows; weights, w; and gathering them, g, if `fsdp` splits them. The
    bound is the smallest value that agrees with the counts within `MARGIN`, by linear programming.
    """
    attentions = list(dict.fromkeys([layout.attention, *(counted.attention for counted in counts)]))

    def terms(layout: Layout) -> np.ndarray:
        weights = layout.accumulate / layout.tensor
        shared = [layout.tensor, weights, weights * (layout.fsdp > 1)]
        return np.array([*(float(layout.attention == name) for name in attentions), *shared])

    rows = np.array([terms(counted) for counted in counts])
    values = np.array(list(counts.values())) / max(counts.values())
    limits = np.concatenate([(1 + MARGIN) * values, -(1 - MARGIN) * values])
    found = scipy.optimize.linprog(terms(layout), np.concatenate([rows, -rows]), limits)
    return found.fun * max(counts.values()) if found.success else 0.0


def shape_of(program: Any, layers: int) -> Shape:
    """Reads sizes from a traced step: the first loop over the layers is their forward pass."""
    saved, carried = next(_loops(program.jaxpr, layers), (0, 0))
    return Shape(count_products(program.jaxpr), saved, carried)


def count_products(program: Any) -> float:
    """FLOPs of the matrix products, loops included; of branches, those of the smallest."""
    flops = 0.0
    for equation in program.eqns:
        inner = [count_products(each) for each in _inner(equation)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * terms * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            flops += min(inner)
        else:
            flops += sum(inner) * equation.params.get("length", 1)
    return flops


def _loops(program: Any, layers: int) -> Iterator[tuple[int, int]]:
    """Bytes that each loop of so many iterations stacks, and the largest array that an iteration passes on."""
    for equation in program.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            carried = equation.params["num_carry"]
            sizes = [x.aval.size * x.aval.dtype.itemsize for x in equation.outvars]
            if sum(sizes[carried:]):
                yield sum(sizes[carried:]), max(sizes[:carried], default=0)
        for each in _inner(equation):
            yield from _loops(each, layers)


def _inner(equation: Any) -> list[Any]:
    values = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    )
    return [getattr(x, "jaxpr", x) for x in values if isinstance(x, ClosedJaxpr | Jaxpr)]


def _frozen_vocabulary(step: LoweredStep) -> int | None:
    """Size of the vocabulary, if the head is frozen, so that the loss comes in chunks."""
    if not head_is_frozen(step.parts):
        return None
    kernel, transposed = head_kernel(params_of(step.parts))
    return kernel.shape[0 if transposed else 1]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _larger(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {name: max(seconds, right.get(name, 0.0)) for name, seconds in left.items()}
