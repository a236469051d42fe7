"""What a training step will need, from the compiler alone: no weights, no data, and for TPUs no TPU.

The step is compiled as `train` would, for the devices here or for a TPU topology. Memory and communication are
those of that program. XLA counts the body of a loop once, however often it runs; so FLOPs and bytes are those of
the same step with its first layers as straight code: of one layer, and for each further one the difference that a
second makes.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..adapt import init_lora
from ..models.llama import head_kernel
from ..sharding import batch_parts, batch_sharding, check_tensor, make_mesh
from ..spec import Specs
from ..tree import count
from .chips import Chip, tpu_devices
from .family import Base, Data, Parts
from .fetch import resolve
from .hlo import Collective, collectives, looped_products
from .language import head_is_frozen
from .memory import free_bytes
from .prepare import (
    adapted,
    batch_shapes,
    check_mesh,
    count_steps,
    family_of,
    lower_step,
    make_optimizer,
    params_of,
    place_all,
    state_shapes,
)
from .settings import Settings

ENDLESS = 10**9
"""Steps that are assumed where the settings count in epochs: how many rows these have is in the data."""
TO_COUNT = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6,
    "xla_tpu_enable_async_collective_fusion": False,
    "exec_time_optimization_effort": -1.0,
}
"""TPU compiler options of the programs that are only counted: no gather is cut into a loop beside its product,
whose body would be counted once, and none is spread over several fusions, each of which would be counted. These
programs never run, so little effort is spent on their speed: half the time to compile, the same FLOPs."""


class Work(NamedTuple):
    """What a device does in a step.

    Attributes:
      flops: additions and multiplications.
      bytes: read and written, by XLA's count, for which all memory is alike: what stays on the chip counts too.
      loops: loops with matrix products that the compiler left, of which both numbers count one round alone.
    """

    flops: float
    bytes: float
    loops: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs. Bytes, FLOPs and seconds are those of one device.

    Attributes:
      model: the path in the settings.
      device, devices: what they are, and how many.
      mesh: axis to size.
      rows, tokens: of a batch, over all devices; and of a row.
      accumulate: micro-batches that a batch is cut into.
      layers: of the model.
      trained, total: parameters.
      memory: bytes by what they are for; temporaries are absent where the compiler gave up.
      needed: bytes in all, as the compiler lays things out; where it gave up, what it says that it wanted.
      peak: bytes in use at once at most, by the compiler's own account; 0 where it gives none.
      room: bytes that there are.
      problem: what the compiler said when it gave up, in a line.
      work: FLOPs and bytes of a step; None where the programs that would tell them need too much memory.
      collectives: what devices exchange in a step; none where the compiler gave up.
      layer_gathers: all-gathers that each layer adds, as XLA makes them when it has straight code.
      roofline: seconds that a step takes at least: `"compute"`, `"memory"`, `"network"`; empty where the rates are
        not known.
      compile_seconds: of the step itself.
    """

    model: str
    device: str
    devices: int
    mesh: dict[str, int]
    rows: int
    tokens: int
    accumulate: int
    layers: int
    trained: int
    total: int
    memory: dict[str, int]
    needed: int
    peak: int
    room: int
    problem: str | None
    work: Work | None
    collectives: tuple[Collective, ...]
    layer_gathers: tuple[Collective, ...]
    roofline: dict[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler made a program, and there is room for it."""
        return self.problem is None and self.needed <= self.room

    @property
    def received(self) -> float:
        """Bytes that come from other devices in a step."""
        return sum(c.times * c.wire_bytes for c in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, and what follows from them."""
        plain = dataclasses.asdict(self) | {"fits": self.fits, "received": self.received}
        plain["work"] = None if self.work is None else self.work._asdict()
        for name in ("collectives", "layer_gathers"):
            plain[name] = [c._asdict() for c in getattr(self, name)]
        return plain


def make_plan(settings: Settings, topology: str | None = None) -> Plan:
    """Compiles the training step and says what it needs.

    Args:
      settings: the run; of its model `config.json` is read, of its data nothing.
      topology: TPUs to compile for, `"v5e:16x16"`; the devices here if not given.

    Raises:
      ValueError, OSError: something does not fit, as in training; an unknown topology.
      ImportError: the compiler for TPUs is not installed.
    """
    chip, devices = (None, jax.devices()) if topology is None else tpu_devices(topology)
    mesh = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    check_mesh(settings, mesh)
    directory = resolve(settings.model.path, "model", files=("config.json",))
    data = family_of(settings).without_data(settings)
    base: Base = family_of(settings).make_base(settings, directory, data.task)
    check_tensor(mesh, base.tensor_sizes)
    step = plan_step(settings, base, data, mesh)
    start = time.perf_counter()
    program, problem = _compiled(step.lowered)
    seconds = time.perf_counter() - start
    memory = {name: local_bytes(*trees) for name, trees in step.held.items()}
    memory["temporaries"], needed, peak = _sizes(program, problem, sum(memory.values()))
    work, gathers = count_work(settings, base, data, mesh)
    found = () if program is None else tuple(collectives(program.as_text()))
    return Plan(
        model=settings.model.path,
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        rows=settings.train.batch_size,
        tokens=settings.data.max_length,
        accumulate=settings.train.accumulate,
        layers=layers_of(base),
        trained=count(step.parts.trainable),
        total=count(step.parts.trainable) + count(step.parts.frozen),
        memory=memory,
        needed=needed,
        peak=peak,
        room=_room(chip, mesh),
        problem=problem,
        work=work,
        collectives=found,
        layer_gathers=gathers,
        roofline={} if chip is None or work is None else roofline(chip, work, found),
        compile_seconds=round(seconds, 1),
    )


class Step(NamedTuple):
    """A step before it is compiled.

    Attributes:
      parts: the model, with shapes for all values.
      lowered: the step.
      held: what it takes, by what it is for: trees of shapes and of shardings.
    """

    parts: Parts
    lowered: jax.stages.Lowered
    held: dict[str, tuple[Any, Any]]


def plan_step(settings: Settings, base: Base, data: Data, mesh: Mesh) -> Step:
    """The step that `train` would compile, of a base whose weights need not be there."""
    parts = adapted(settings, base, settings.applied, _adapter_shapes)
    train = dataclasses.replace(settings.train, steps=settings.train.steps or ENDLESS, epochs=None)
    steps = count_steps(dataclasses.replace(settings, train=train), train.batch_size)
    tx = make_optimizer(settings.optimizer, settings.applied, steps, parts.specs)
    places = place_all(parts, tx, mesh)
    state = state_shapes(parts, tx)
    batch = batch_shapes(data.splits["train"], train.batch_size)
    held = {
        "frozen weights": (parts.frozen, places.frozen),
        "trained": (state.trainable, places.state.trainable),
        "optimizer": (state.opt_state, places.state.opt_state),
        "batch": (batch, jax.tree.map(lambda _: batch_sharding(mesh), batch)),
    }
    return Step(parts, lower_step(settings, data, parts, tx, mesh, places), held)


def _adapter_shapes(model: Any, key: Any, *inputs: Any) -> tuple[Any, Specs]:
    """As `init_lora`, with shapes in the place of factors."""
    specs: Specs = {}

    def make(key: Any) -> Any:
        factors, found = init_lora(model, key, *inputs)
        specs.update(found)
        return factors

    return jax.eval_shape(make, key), specs


def local_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays or shapes that one device holds."""
    sizes = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def layers_of(base: Base) -> int:
    """How many equal layers a model stacks."""
    model: Any = base.model
    return model.config.num_hidden_layers


def count_work(
    settings: Settings, base: Base, data: Data, mesh: Mesh
) -> tuple[Work | None, tuple[Collective, ...]]:
    """FLOPs and bytes of a step, and the all-gathers of a layer, from programs of one and of two unrolled layers.

    Micro-batches and pieces of the loss are loops too. So one micro-batch is compiled, with the loss in one piece,
    and multiplied; each further piece of the loss reads the head twice more.
    """
    parts, layers = settings.train.accumulate, layers_of(base)
    train = dataclasses.replace(settings.train, batch_size=settings.train.batch_size // parts, accumulate=1)
    # A stack computes adapters in all its layers as soon as one has them: those of the others are zero. Here it is
    # the first, as the later ones are not there; None would adapt what lies outside of the layers too.
    chosen = None if settings.lora.layers_to_transform is None else (0,)
    lora = dataclasses.replace(settings.lora, layers_to_transform=chosen)
    small = dataclasses.replace(settings, train=train, lora=lora)
    if settings.is_language:
        tokens = train.batch_size * settings.data.max_length
        small = dataclasses.replace(small, model=dataclasses.replace(settings.model, loss_chunk=tokens))
    steps = [plan_step(small, with_layers(base, min(n, layers)), data, mesh) for n in (1, 2)]
    first, second = (_counted(step, mesh) for step in steps)
    if first is None or second is None:
        return None, ()
    flops = extrapolated(first.flops, second.flops, layers)
    size = extrapolated(first.bytes, second.bytes, layers) + head_bytes(settings, steps[0].parts, mesh)
    work = Work(parts * flops, parts * size, second.loops)
    return work, tuple((second.gathers - first.gathers).elements())


class _Counted(NamedTuple):
    """A program's cost, and its all-gathers without what tells equal ones of several layers apart."""

    flops: float
    bytes: float
    loops: int
    gathers: Counter[Collective]


def _counted(step: Step, mesh: Mesh) -> _Counted | None:
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    program, problem = _compiled(step.lowered, TO_COUNT if on_tpu else None)
    if problem is not None:
        return None
    text, cost = program.as_text(), program.cost_analysis()
    gathers = (c._replace(where="") for c in collectives(text) if c.kind == "all-gather")
    return _Counted(cost["flops"], cost["bytes accessed"], looped_products(text), Counter(gathers))


def extrapolated(first: float, second: float, layers: int) -> float:
    """The cost of a model from those of its first layer, and of its first two.

    >>> extrapolated(10.0, 13.0, 4)
    19.0
    """
    return first + (layers - 1) * (second - first)


def with_layers(base: Base, layers: int) -> Base:
    """The same model with another number of layers, as straight code."""
    model: Any = base.model
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    return base._replace(model=model.clone(config=config, unroll=True))


def head_bytes(settings: Settings, parts: Parts, mesh: Mesh) -> float:
    """What a micro-batch's loss in pieces reads beyond one in one piece: all but the first read the head twice."""
    if not settings.is_language or not head_is_frozen(parts):
        return 0.0
    kernel, transposed = head_kernel(params_of(parts))
    words = kernel.shape[0 if transposed else 1]
    tensor = mesh.shape["tensor"] if words % mesh.shape["tensor"] == 0 else 1
    rows = settings.train.batch_size // settings.train.accumulate
    at_once = max(1, settings.model.loss_chunk * batch_parts(mesh) // rows)
    pieces = -(-settings.data.max_length // at_once)
    return (pieces - 1) * 2 * kernel.size * jnp.dtype(settings.model.dtype).itemsize / tensor


def roofline(chip: Chip, work: Work, found: Sequence[Collective]) -> dict[str, float]:
    """Seconds that a step takes at least, were one thing alone in the way."""
    received = sum(c.times * c.wire_bytes for c in found)
    return {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.hbm_rate,
        "network": received / chip.ici_rate,
    }


def _compiled(lowered: jax.stages.Lowered, options: dict[str, Any] | None = None) -> tuple[Any, str | None]:
    """The program, or what the compiler said when memory was too small for any."""
    try:
        return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())


def _sizes(program: Any, problem: str | None, held: int) -> tuple[int, int, int]:
    """Temporaries, the whole need, and the peak."""
    if program is None:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", problem or "")
        needed = int(float(used[1]) * 2 ** (10 * (" KMGT".index(used[2])))) if used else held
        return max(0, needed - held), needed, 0
    sizes = program.memory_analysis()
    fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    passing = sizes.temp_size_in_bytes + fresh
    needed = sizes.argument_size_in_bytes + passing + sizes.generated_code_size_in_bytes
    return passing, needed, getattr(sizes, "peak_memory_in_bytes", 0)


def _room(chip: Chip | None, mesh: Mesh) -> int:
    if chip is not None:
        return int(chip.hbm_bytes)
    device = mesh.devices.flat[0]
    shares = len(mesh.local_devices) if device.platform == "cpu" else 1  # these share the host's memory
    return free_bytes(device) // shares
