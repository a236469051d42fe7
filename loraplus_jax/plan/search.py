"""Searches for a fast layout of a training step that fits: mesh, micro-batches and remat.

Every layout gets an estimate of its memory and time, from shapes alone. Those with the smallest estimates are
counted by programs of one and of two layers, and compiled in the order of these counts, until one fits that none of
them can beat.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh

from ..models.choices import Remat
from ..settings.schema import Settings
from ..step.sharding import make_mesh, make_shardings
from ..training.estimate import count_flops
from ..training.signals import StopSignal
from .devices import Chip
from .plan import Plan, Work, check_layout, check_length, count_work, layers_of, make_model, plan_for
from .programs import LoweredStep, local_bytes, plan_step

SETTINGS = {
    "data": "mesh.data",
    "fsdp": "mesh.fsdp",
    "tensor": "mesh.tensor",
    "accumulate": "train.accumulate",
    "remat": "model.remat",
}
"""The settings that a search changes, by field of `Layout`. A step computes the same with any of them, except for
rounding and for the masks of dropout, which differ between micro-batches."""
COUNTED = 6
"""Layouts that are counted, and then compiled, at a time."""
TOO_LARGE = "needs more memory than available"
LARGER = "not compiled: one with a smaller estimate does not fit"
UNCOUNTED = "the programs that count its work need more memory than available"


class Layout(NamedTuple):
    """How a step is split over devices and time; see `SETTINGS`."""

    data: int
    fsdp: int
    tensor: int
    accumulate: int
    remat: Remat

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the mesh's axes."""
        return self[:3]

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


@dataclasses.dataclass
class Trial:
    """What a search knows of a layout.

    Attributes:
      layout: the layout.
      needed: bytes that a device needs; a lower bound unless compiled.
      times: seconds of a step, by `"compute"`, `"memory"` and `"network"`; estimated, counted or compiled.
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
        """Seconds of a step, by whichever takes longest; with a plan, its roofline."""
        return max(self.times.values())

    @property
    def fits(self) -> bool:
        """Whether it compiled and fits."""
        return self.plan is not None and self.problem is None


class Search:
    """A search for the layout with the smallest roofline time that fits, at the same tokens per step.

    Attributes:
      current: the layout of the settings.
      rejected: why training would reject that layout; None if it would not.
      trials: the layouts that training accepts, with all weights split over `fsdp` or none, by their estimates.
      complete: whether the search ended by itself.
      received: the signal that ended it, if one did.
    """

    def __init__(
        self, settings: Settings, chip: Chip, devices: Sequence[Any], fixed: Collection[str] = ()
    ) -> None:
        """Lists the layouts and their estimates.

        Args:
          settings: settings of the run, as for `make_plan`.
          chip: figures of the devices.
          devices: devices to compile for; every layout but the settings' own uses all of them.
          fixed: names of settings that stay as they are, such as `"model.remat"`.

        Raises:
          ValueError, OSError: settings that training would reject with any layout.
        """
        self._settings, self._chip, self._devices = settings, chip, devices
        self._base, self._task = make_model(settings)
        check_length(settings, self._base)
        own = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
        data, fsdp, tensor = own.devices.shape
        self.current = Layout(data, fsdp, tensor, settings.train.accumulate, settings.model.remat)
        self.rejected: str | None = None
        self.complete, self.received = False, None
        self._counted: dict[str, Work | None] = {}
        layouts = list(self._layouts({field for field, name in SETTINGS.items() if name in fixed}))
        if not layouts:
            raise ValueError(self.rejected or f"no mesh of {len(devices)} devices splits the batch")
        self.trials = self._estimate(layouts)

    @property
    def start(self) -> Trial | None:
        """The trial of the settings' own layout."""
        return next((trial for trial in self.trials if trial.layout == self.current), None)

    @property
    def best(self) -> Trial | None:
        """The fastest layout that compiled and fits."""
        fitting = [trial for trial in self.trials if trial.fits]
        return min(fitting, key=lambda trial: trial.seconds, default=None)

    def run(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Compiles the settings' own layout and then searches; Ctrl-C ends it after the program in work.

        Args:
          report: called with a line on each layout that was counted or compiled.
        """
        with StopSignal() as stop:
            for line in self._try_layouts():
                report(line)
                if (number := stop.received) is not None:
                    self.received = number
                    report("interrupted")
                    return
        self.complete = True

    def _try_layouts(self) -> Iterator[str]:
        if self.start is not None and self.start.problem is None:
            self._compile(self.start)
            yield f"compiled {describe(self.start)}"
        while batch := [trial for trial in self.trials if self._may_win(trial)][:COUNTED]:
            before = self.best
            for trial in batch:
                self._count(trial)
                yield f"counted {describe(trial)}"
            for trial in sorted(batch, key=lambda trial: (trial.seconds, trial.needed)):
                if self._may_win(trial):
                    self._compile(trial)
                    yield f"compiled {describe(trial)}"
            if self.best is not before:
                break

    def _may_win(self, trial: Trial) -> bool:
        is_open = trial.plan is None and trial.problem is None
        return is_open and (self.best is None or trial.seconds < self.best.seconds)

    def _count(self, trial: Trial) -> None:
        settings = trial.layout.apply(self._settings)
        mesh = make_mesh(*trial.layout.mesh, devices=self._devices)
        trial.work = count_work(settings, make_model(settings)[0], self._task, mesh, self._counted)
        if trial.work is None:
            trial.problem = UNCOUNTED
        else:
            counts = {"compute": trial.work.flops / self._chip.flops}
            trial.times |= counts | {"memory": trial.work.bytes / self._chip.memory_rate}

    def _compile(self, trial: Trial) -> None:
        """Plans a trial; if it does not fit, leaves out those alike with as large an estimate and micro-batches."""
        settings, estimate = trial.layout.apply(self._settings), trial.needed
        trial.plan = plan = plan_for(settings, self._chip, self._devices, self._counted)
        trial.work, trial.needed, trial.times = plan.work, plan.needed, plan.roofline or trial.times
        if not plan.fits:
            trial.problem = "does not fit"
            for other in self.trials:
                is_alike = other.layout.remat == trial.layout.remat
                # More micro-batches are smaller ones, which may fit.
                is_as_large = other.needed >= estimate and other.layout.accumulate <= trial.layout.accumulate
                if is_alike and is_as_large and other.plan is None and other.problem is None:
                    other.problem = LARGER
        elif plan.work is None:
            trial.problem = UNCOUNTED

    def _layouts(self, fixed: Collection[str]) -> Iterator[Layout]:
        """The settings' own layout, and all others of the devices that keep the fixed fields."""
        count, current, settings = len(self._devices), self.current, self._settings
        sizes = [
            mesh
            for mesh in itertools.product(_divisors(count), repeat=3)
            if math.prod(mesh) == count
            # In between, a device receives about as many bytes as with all weights split, and holds more of them.
            and (1 in mesh[:2] or {"data", "fsdp"} & set(fixed))
            and all(mesh[n] == current[n] for n, axis in enumerate(Layout._fields[:3]) if axis in fixed)
        ]
        parts = [current.accumulate] if "accumulate" in fixed else _divisors(settings.train.batch_size)
        is_free = settings.is_language and "remat" not in fixed
        remats = get_args(Remat) if is_free else [current.remat]
        meshes = dict.fromkeys([current.mesh, *sizes])
        for (data, fsdp, tensor), accumulate in itertools.product(meshes, parts):
            layout = Layout(data, fsdp, tensor, accumulate, current.remat)
            mesh = make_mesh(*layout.mesh, devices=self._devices)
            try:
                check_layout(layout.apply(settings), self._base, mesh)
            except ValueError as error:
                if layout == current:
                    self.rejected = str(error)
            else:
                yield from (layout._replace(remat=remat) for remat in remats)

    def _estimate(self, layouts: Sequence[Layout]) -> list[Trial]:
        """Trials with estimates from shapes, smallest first.

        A device needs its share of what is saved. It reads the weights of the layers forward and backward in each
        micro-batch, and receives what others hold of them at least once. A tensor axis all-reduces what a layer
        passes on, twice forward and twice backward (arXiv 1909.08053, section 3).
        """
        chip, layers, shapes = self._chip, layers_of(self._base), {}
        step: Any = None
        # One mesh serves all layouts: the arrays of a jaxpr have their sizes over all devices.
        for remat in dict.fromkeys(layout.remat for layout in layouts):
            applied = layouts[0]._replace(accumulate=1, remat=remat).apply(self._settings)
            mesh = make_mesh(*layouts[0].mesh, devices=self._devices)
            step = plan_step(applied, make_model(applied)[0], self._task, mesh)
            shapes[remat] = shape_of(step.jaxpr, layers)
        sizes = {mesh: self._weights(mesh, step) for mesh in dict.fromkeys(layout.mesh for layout in layouts)}
        rates = {
            (mesh, axis): chip.rate_between(hosts_along(make_mesh(*mesh, devices=self._devices), axis))
            for mesh in sizes
            for axis in ("fsdp", "tensor")
        }
        trials = []
        for layout in layouts:
            shape, (held, gathered), count = shapes[layout.remat], sizes[layout.mesh], math.prod(layout.mesh)
            received = layout.accumulate * gathered * (1 - 1 / layout.fsdp)
            reduced = 8 * layers * shape.carried * (layout.tensor - 1) / count
            times = {
                "compute": shape.flops / count / chip.flops,
                "memory": (2 * layout.accumulate * gathered + 2 * shape.saved / count) / chip.memory_rate,
                "network": received / rates[layout.mesh, "fsdp"] + reduced / rates[layout.mesh, "tensor"],
            }
            needed = held + shape.saved / count / layout.accumulate
            trials.append(
                Trial(layout, needed, times, problem=TOO_LARGE if needed > chip.available else None)
            )
        # Of those that are equal to two digits, few devices on the tensor axis: each of them repeats what the axis
        # does not split, which the estimate leaves out.
        return sorted(
            trials,
            key=lambda t: (float(f"{t.seconds:.2g}"), t.layout.tensor, sum(t.times.values()), t.needed),
        )

    def _weights(self, sizes: tuple[int, int, int], step: LoweredStep) -> tuple[int, int]:
        """Bytes that a device holds between steps, and those of the layers that it gathers over `fsdp`."""
        mesh = make_mesh(*sizes, devices=self._devices)
        parts, state = step.parts, step.run.state
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


def hosts_along(mesh: Mesh, axis: str) -> int:
    """Hosts that the devices of a group along an axis are on: the most of all groups."""
    hosts = np.array([device.process_index for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    groups = np.moveaxis(hosts, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return max(len(set(group)) for group in groups.tolist())


def describe(trial: Trial) -> str:
    """A layout and what is known of it, on one line."""
    values = zip(SETTINGS.values(), trial.layout, strict=True)
    words = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in values)
    return f"{words}: {trial.problem or f'{trial.seconds:.3f} s'}"


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


def shape_of(program: Any, layers: int) -> Shape:
    """Reads sizes from a traced step: the first loop over the layers is their forward pass."""
    saved, carried = next(_loops(program.jaxpr, layers), (0, 0))
    return Shape(count_flops(program.jaxpr), saved, carried)


def _loops(program: Any, layers: int) -> Iterator[tuple[int, int]]:
    """Bytes that each loop of so many iterations stacks, and the largest array that an iteration passes on."""
    for equation in program.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            # A scan returns what it carries, then what it stacks: here what the backward pass reads.
            carried = equation.params["num_carry"]
            sizes = [x.aval.size * x.aval.dtype.itemsize for x in equation.outvars]
            if sum(sizes[carried:]):
                yield sum(sizes[carried:]), max(sizes[:carried], default=0)
        for each in _inner(equation):
            yield from _loops(each, layers)


def _inner(equation: Any) -> list[Any]:
    # A program may be any parameter, or within a tuple of one; which, differs between primitives and jax versions.
    values = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    )
    return [getattr(x, "jaxpr", x) for x in values if isinstance(x, ClosedJaxpr | Jaxpr)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
