"""What a training step will need, from the compiler alone: no weights, no data, and for TPUs no TPU.

The step is compiled as `train` would, for the devices here or for a TPU topology. Memory and communication are
those of that program. XLA counts the body of a loop once, however often it runs; so FLOPs and bytes are those of
the same step with its first layers as straight code: of one layer, and for each further one the difference that a
second makes.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..data.fetch import resolve
from ..models.llama import head_kernel
from ..settings.schema import Settings
from ..sharding import batch_parts, check_tensor, make_mesh
from ..tasks.causal_lm import head_is_frozen
from ..tasks.interface import AdaptedModel, BaseModel, TaskData
from ..training.memory import free_bytes
from ..training.setup import check_mesh, params_of, task_module
from ..training.xla import compiler_options
from ..tree import count
from .hlo import Collective, collectives, count_looped_matmuls
from .programs import (
    LoweredStep,
    evaluation_bytes,
    local_bytes,
    memory_sizes,
    plan_step,
    theory_bytes,
    try_compile,
)
from .tpu import Chip, tpu_devices

COUNTING_OPTIONS = {
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
      tensor_sizes: what the mesh's tensor axis must divide, by name.
      trained, total: parameters.
      memory: bytes by what they are for; temporaries are absent where the compiler gave up.
      needed: bytes in all, as the compiler lays things out; where it gave up, what it says that it wanted.
      peak: bytes in use at once at most, by the compiler's own account; 0 where it gives none.
      evaluation: bytes that an evaluation needs in all, optimizer included; None where it is not counted.
      theory: the same of what `train.theory_every` measures with; None where that is not set.
      room: bytes that there are.
      problem: what the compiler said when it gave up, in a line.
      work: FLOPs and bytes of a step; None where the programs that would tell them need too much memory.
      collectives: what devices exchange in a step; none where the compiler gave up.
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
    tensor_sizes: dict[str, int]
    trained: int
    total: int
    memory: dict[str, int]
    needed: int
    peak: int
    evaluation: int | None
    theory: int | None
    room: int
    problem: str | None
    work: Work | None
    collectives: tuple[Collective, ...]
    roofline: dict[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler made the programs, and there is room for the largest: they run in turn."""
        return self.problem is None and self.most <= self.room

    @property
    def most(self) -> int:
        """Bytes that the largest of step, evaluation and theory needs."""
        return max(self.needed, self.evaluation or 0, self.theory or 0)

    @property
    def received(self) -> float:
        """Bytes that come from other devices in a step."""
        return sum(c.times * c.wire_bytes for c in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, and what follows from them."""
        plain = dataclasses.asdict(self) | {"fits": self.fits, "received": self.received}
        plain["work"] = None if self.work is None else self.work._asdict()
        plain["collectives"] = [c._asdict() for c in self.collectives]
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
    if topology is None and (address := settings.distributed.coordinator) is not None:
        raise ValueError(
            f"distributed.coordinator is {address}, and a plan joins no other process: give --topology, or "
            "--distributed.coordinator null to plan for the devices here"
        )
    chip, devices = (None, jax.devices()) if topology is None else tpu_devices(topology)
    mesh = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    check_mesh(settings, mesh)
    directory = resolve(settings.model.path, "model", files=("config.json",))
    data = task_module(settings).placeholder_data(settings)
    base: BaseModel = task_module(settings).make_base(settings, directory, data.task)
    check_tensor(mesh, base.tensor_sizes)
    check_length(settings, base)
    step = plan_step(settings, base, data, mesh)
    start = time.perf_counter()
    program, problem = try_compile(step.lowered, compiler_options(mesh, unrolled=settings.model.unroll))
    seconds = time.perf_counter() - start
    memory = {name: local_bytes(*trees) for name, trees in step.held.items()}
    memory["temporaries"], needed, peak = memory_sizes(program, problem, sum(memory.values()))
    evaluation, evaluation_problem = evaluation_bytes(settings, data, step, mesh)
    theory, theory_problem = theory_bytes(settings, data, step, mesh)
    work = count_work(settings, base, data, mesh)
    exchanges = () if program is None else tuple(collectives(program.as_text()))
    return Plan(
        model=settings.model.path,
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        rows=settings.train.batch_size,
        tokens=settings.data.max_length,
        accumulate=settings.train.accumulate,
        layers=layers_of(base),
        tensor_sizes=dict(base.tensor_sizes),
        trained=count(step.parts.trainable),
        total=count(step.parts.trainable) + count(step.parts.frozen),
        memory=memory,
        needed=needed,
        peak=peak,
        evaluation=evaluation,
        theory=theory,
        room=_available_bytes(chip, mesh),
        problem=problem or evaluation_problem or theory_problem,
        work=work,
        collectives=exchanges,
        roofline={} if chip is None or work is None else roofline(chip, work, exchanges),
        compile_seconds=round(seconds, 1),
    )


def check_length(settings: Settings, base: BaseModel) -> None:
    """Raises ValueError if rows are longer than the model takes, as training does when it reads the data."""
    model: Any = base.model
    length, longest = settings.data.max_length, model.config.max_length
    if length > longest:
        raise ValueError(f"data.max_length is {length}, the model takes {longest} tokens at most")


def layers_of(base: BaseModel) -> int:
    """How many equal layers a model stacks."""
    model: Any = base.model
    return model.config.num_hidden_layers


def count_work(settings: Settings, base: BaseModel, data: TaskData, mesh: Mesh) -> Work | None:
    """FLOPs and bytes of a step, from programs of one and of two unrolled layers.

    Micro-batches and pieces of the loss are loops too. So one micro-batch is compiled, with the loss in one piece,
    and multiplied; each further piece of the loss reads the head twice more.
    """
    parts, layers = settings.train.accumulate, layers_of(base)
    train = dataclasses.replace(settings.train, batch_size=settings.train.batch_size // parts, accumulate=1)
    # A stack computes adapters in all its layers as soon as one has them: those of the others are zero. Here it is
    # the first, as the later ones are not there; None would adapt what lies outside of the layers too.
    adapted_layers = None if settings.lora.layers_to_transform is None else (0,)
    lora = dataclasses.replace(settings.lora, layers_to_transform=adapted_layers)
    small = dataclasses.replace(settings, train=train, lora=lora)
    if settings.is_language:
        tokens = train.batch_size * settings.data.max_length
        small = dataclasses.replace(small, model=dataclasses.replace(settings.model, loss_chunk=tokens))
    steps = [plan_step(small, replace_depth(base, min(n, layers)), data, mesh) for n in (1, 2)]
    first, second = (_compile_and_count(step, mesh) for step in steps)
    if first is None or second is None:
        return None
    flops = extrapolate_layers(first.flops, second.flops, layers)
    size = extrapolate_layers(first.bytes, second.bytes, layers) + head_bytes(settings, steps[0].parts, mesh)
    return Work(parts * flops, parts * size, second.loops)


def _compile_and_count(step: LoweredStep, mesh: Mesh) -> Work | None:
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    program, problem = try_compile(step.lowered, COUNTING_OPTIONS if on_tpu else None)
    if problem is not None:
        return None
    cost = program.cost_analysis()
    return Work(cost["flops"], cost["bytes accessed"], count_looped_matmuls(program.as_text()))


def extrapolate_layers(first: float, second: float, layers: int) -> float:
    """The cost of a model from those of its first layer, and of its first two.

    >>> extrapolate_layers(10.0, 13.0, 4)
    19.0
    """
    return first + (layers - 1) * (second - first)


def replace_depth(base: BaseModel, layers: int) -> BaseModel:
    """The same model with another number of layers, as straight code."""
    model: Any = base.model
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    return base._replace(model=model.clone(config=config, unroll=True))


def head_bytes(settings: Settings, parts: AdaptedModel, mesh: Mesh) -> float:
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


def roofline(chip: Chip, work: Work, exchanges: Sequence[Collective]) -> dict[str, float]:
    """Seconds that a step takes at least, were one thing alone in the way."""
    received = sum(c.times * c.wire_bytes for c in exchanges)
    return {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.hbm_rate,
        "network": received / chip.ici_rate,
    }


def _available_bytes(chip: Chip | None, mesh: Mesh) -> int:
    if chip is not None:
        return int(chip.hbm_bytes)
    device = mesh.devices.flat[0]
    shares = len(mesh.local_devices) if device.platform == "cpu" else 1  # these share the host's memory
    return free_bytes(device) // shares
