"""Predicts what a training step needs, from the compiler alone: no weights, no data, no TPU or GPU.

The step is compiled as `train` would, for local devices or a topology. Memory and communication come from that
program. XLA's cost analysis counts the body of a loop once, however often it runs; so FLOPs and bytes come from the
same step with one and with two unrolled layers (on GPUs two and three): the cost of the first program, plus the
increment of each further layer.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._utils.validation import check_all
from ..adapter.tree import count
from ..data.fetch import resolve
from ..models.decoder import head_kernel
from ..models.files import open_files
from ..settings.schema import Settings
from ..step.sharding import batch_parts, check_tensor, make_mesh
from ..tasks.causal_lm import head_is_frozen
from ..tasks.interface import AdaptedModel, BaseModel, Task
from ..training.memory import free_bytes
from ..training.setup import check_mesh, params_of, task_class
from ..training.xla import compiler_options
from .devices import Chip, Gpu, restore_targets, target_devices
from .hlo import Collective, collectives, count_looped_matmuls
from .kernel_costs import kernel_work
from .programs import LoweredStep, bytes_between_steps, local_bytes, memory_sizes, plan_step, try_compile

COUNTING_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6,
    "xla_tpu_enable_async_collective_fusion": False,
    "exec_time_optimization_effort": -1.0,
}
"""TPU compiler options for programs that are only counted, never run. No all-gather is split into a loop with its
matmul (the loop body would count once) or spread over several fusions (each would count). Low optimization effort
halves the compile time and leaves the FLOPs unchanged."""


class Work(NamedTuple):
    """Work of one device in a step.

    Attributes:
      flops: additions and multiplications.
      bytes: bytes read and written, by XLA's count, which includes traffic that stays on the chip.
      loops: remaining loops with matmuls, of which both numbers count only one iteration.
      kernels: kernels whose FLOPs are not counted.
    """

    flops: float
    bytes: float
    loops: int = 0
    kernels: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs. Bytes, FLOPs and seconds are per device.

    Attributes:
      model: model path in the settings.
      device: kind of device.
      chip: figures of the device; None if it is a local one.
      devices: number of devices.
      mesh: maps a mesh axis to its size.
      rows: rows of a batch, over all devices.
      tokens: tokens per row.
      accumulate: micro-batches per batch.
      layers: layers of the model.
      trained: number of trained parameters.
      total: number of parameters.
      memory: bytes by purpose; if compilation failed, temporaries are what the compiler's message implies. Kernels'
        workspace is an estimate, for GPUs only.
      needed: total bytes with the compiler's array layouts; if compilation failed, the total in its message.
      peak: peak memory in bytes, as the compiler reports it; 0 if it does not.
      evaluation: total bytes of an evaluation, optimizer state included; None if not counted.
      theory: total bytes of the theory metrics (`train.theory_every`); None if not set.
      room: available bytes; of a GPU, what JAX reserves.
      problem: the compiler's message if it ran out of memory, on one line.
      work: FLOPs and bytes of a step; None if the programs that count them need too much memory.
      collectives: collectives of a step; empty if compilation failed.
      roofline: lower bounds on the seconds of a step by `"compute"`, `"memory"` and `"network"`; empty if the
        rates or the work are unknown.
      compile_seconds: time to compile the step.
    """

    model: str
    device: str
    chip: Chip | None
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
        """Whether all programs compiled and the largest fits; they run one at a time."""
        return self.problem is None and self.most <= self.room

    @property
    def most(self) -> int:
        """Bytes of the largest of step, evaluation and theory metrics."""
        return max(self.needed, self.evaluation or 0, self.theory or 0)

    @property
    def received(self) -> float:
        """Bytes received from other devices in a step."""
        return sum(c.times * c.wire_bytes for c in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, plus `fits` and `received`."""
        plain = dataclasses.asdict(self) | {"fits": self.fits, "received": self.received}
        plain["work"] = None if self.work is None else self.work._asdict()
        plain["collectives"] = [c._asdict() for c in self.collectives]
        return plain


def make_plan(settings: Settings, topology: str | None = None) -> Plan:
    """Compiles the training step and returns what it needs.

    Args:
      settings: settings of the run; reads only the model's `config.json`, and no data.
      topology: devices to compile for, such as `"h100:8"` or `"v5e:16x16"`; None plans for local devices.

    Raises:
      ValueError, OSError: settings that training would reject too, or an unknown topology.
      ImportError: the compiler of the topology's devices is not installed.
    """
    if topology is None and (address := settings.distributed.coordinator) is not None:
        raise ValueError(
            f"plan runs in one process, got distributed.coordinator {address}; pass --topology, or "
            "--distributed.coordinator null to plan for local devices"
        )
    if topology is None:
        return plan_for(settings, None, jax.devices())
    with restore_targets():
        return plan_for(settings, *target_devices(topology))


def plan_for(
    settings: Settings,
    chip: Chip | None,
    devices: Sequence[Any],
    counted: dict[str, Work | None] | None = None,
) -> Plan:
    """`make_plan` for given devices, and for the chip that they are if its figures are known.

    `counted` as in `count_work`.

    Raises:
      ValueError, OSError: settings that training would reject too.
    """
    mesh = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    base, task = make_model(settings)
    check_layout(settings, base, mesh)
    step, text, memory, needed, peak, seconds, problem = compile_step(settings, base, task, mesh, chip)
    library = matmul_workspace(chip) if isinstance(chip, Gpu) else 0
    between_steps = bytes_between_steps(settings, step, library)
    problems = [problem, *(message for _, message in between_steps.values())]
    work = count_work(settings, base, task, mesh, counted)
    hosts = [device.process_index for device in mesh.devices.flat]
    communication = tuple(collectives(text, hosts)) if text else ()
    return Plan(
        model=settings.model.path,
        device=mesh.devices.flat[0].device_kind,
        chip=chip,
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
        evaluation=between_steps["evaluation"][0],
        theory=between_steps["theory"][0],
        room=_available_bytes(chip, mesh),
        problem=next(filter(None, problems), None),
        work=work,
        collectives=communication,
        roofline={} if chip is None or work is None else roofline(chip, work, communication),
        compile_seconds=round(seconds, 1),
    )


class CompiledStep(NamedTuple):
    """A training step and what it needs.

    Attributes:
      step: the lowered step.
      text: the compiled program; empty if the compiler ran out of memory.
      memory, needed, peak, problem: as in `Plan`.
      seconds: time to compile it.
    """

    step: LoweredStep
    text: str
    memory: dict[str, int]
    needed: int
    peak: int
    seconds: float
    problem: str | None


def compile_step(
    settings: Settings, base: BaseModel, task: Task, mesh: Mesh, chip: Chip | None
) -> CompiledStep:
    """Compiles the training step as `train` does, for a base without weights."""
    step = plan_step(settings, base, task, mesh)
    start = time.perf_counter()
    # With the options of `train`: they change memory and collectives.
    program, problem = try_compile(step.lowered, compiler_options(mesh, unrolled=bool(settings.model.unroll)))
    seconds = time.perf_counter() - start
    memory = {name: local_bytes(*trees) for name, trees in step.held.items()}
    memory["temporaries"], needed, peak = memory_sizes(program, problem, sum(memory.values()))
    text = "" if program is None else program.as_text()
    if isinstance(chip, Gpu):
        memory[WORKSPACE] = matmul_workspace(chip) + kernel_work(text).workspace
        needed += memory[WORKSPACE]
    return CompiledStep(step, text, memory, needed, peak, seconds, problem)


WORKSPACE = "kernel workspace (estimate)"


def make_model(settings: Settings) -> tuple[BaseModel, Task]:
    """The model without weights, and its task.

    Raises:
      ValueError, OSError: the model cannot be found or made.
    """
    files = open_files(resolve(settings.model.path, "model", files=("config.json",)))
    task = task_class(settings).without_data(settings.task_options)
    return task.make_base(settings.task_options, files), task


def check_layout(settings: Settings, base: BaseModel, mesh: Mesh) -> None:
    """Raises ValueError if the mesh cannot split batch or model, or rows are longer than the model takes."""
    check_all(
        lambda: check_mesh(settings, mesh),
        lambda: check_tensor(mesh, base.tensor_sizes),
        lambda: check_length(settings, base),
    )


def check_length(settings: Settings, base: BaseModel) -> None:
    """Raises ValueError if data.max_length exceeds the model's limit, as training does when it reads the data."""
    model: Any = base.model
    length, longest = settings.data.max_length, model.config.max_length
    if length > longest:
        raise ValueError(f"data.max_length must be at most {longest}, the model's limit, got {length}")


def layers_of(base: BaseModel) -> int:
    """Number of identical layers that the model stacks."""
    model: Any = base.model
    return model.config.num_hidden_layers


def count_work(
    settings: Settings,
    base: BaseModel,
    task: Task,
    mesh: Mesh,
    counted: dict[str, Work | None] | None = None,
) -> Work | None:
    """FLOPs and bytes of a step, from programs with one and with two unrolled layers, on GPUs with two and three.

    `counted`, where given, keeps the counts by the text of the program, so that equal programs compile once.

    Micro-batches and chunks of the loss are loops too. So one micro-batch is compiled with the loss in one chunk,
    and multiplied; each further chunk of the loss reads the head twice more.
    """
    parts = settings.train.accumulate
    small = _one_loss_chunk(settings, settings.train.batch_size // parts)
    steps: list[LoweredStep] = []

    def lower(base: BaseModel) -> jax.stages.Lowered:
        steps.append(plan_step(small, base, task, mesh))
        return steps[-1].lowered

    work = _count_layers(base, mesh, lower, {} if counted is None else counted)
    if work is None:
        return None
    size = work.bytes + head_bytes(settings, steps[0].parts, mesh)
    return work._replace(flops=parts * work.flops, bytes=parts * size)


def _one_loss_chunk(settings: Settings, rows: int) -> Settings:
    """The settings for one micro-batch of so many rows, whose loss is a single chunk."""
    train = dataclasses.replace(settings.train, batch_size=rows, accumulate=1)
    # If any layer of a stack has adapters, all compute them, with zeros in the others. The short programs have no
    # later layers, so adapt the first; None would also adapt modules outside the layers.
    adapted_layers = None if settings.lora.layers_to_transform is None else (0,)
    lora = dataclasses.replace(settings.lora, layers_to_transform=adapted_layers)
    small = dataclasses.replace(settings, train=train, lora=lora)
    if settings.is_language:
        chunk = rows * settings.data.max_length
        small = dataclasses.replace(small, model=dataclasses.replace(settings.model, loss_chunk=chunk))
    return small


def _count_layers(
    base: BaseModel,
    mesh: Mesh,
    lower: Callable[[BaseModel], jax.stages.Lowered],
    counted: dict[str, Work | None],
) -> Work | None:
    """The work of all layers, from the lowered programs of a base with one and with two layers."""
    layers = layers_of(base)
    # XLA for GPUs fuses a single layer with what surrounds it, in another way than several.
    least = 2 if mesh.devices.flat[0].platform == "gpu" else 1
    depths = [min(n, layers) for n in (least, least + 1)]
    first, second = (_count_once(lower(replace_depth(base, n)), mesh, counted) for n in depths)
    if first is None or second is None:
        return None
    flops = extrapolate_layers(first.flops, second.flops, layers - depths[0])
    size = extrapolate_layers(first.bytes, second.bytes, layers - depths[0])
    return Work(flops, size, second.loops, second.kernels)


def _count_once(lowered: jax.stages.Lowered, mesh: Mesh, counted: dict[str, Work | None]) -> Work | None:
    # A search counts a layout before it plans it: equal programs compile once.
    if (source := lowered.as_text()) in counted:
        return counted[source]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    program, problem = try_compile(lowered, COUNTING_OPTIONS if on_tpu else None)
    counted[source] = None
    if problem is None:
        cost, text = cost_analysis(program), program.as_text()
        kernels = kernel_work(text)
        flops, size = cost["flops"] + kernels.flops, cost["bytes accessed"] + kernels.bytes
        counted[source] = Work(flops, size, count_looped_matmuls(text), kernels.unknown)
    return counted[source]


def cost_analysis(program: jax.stages.Compiled) -> dict[str, float]:
    """XLA's count of a program's `"flops"` and `"bytes accessed"`."""
    compiled: Any = program
    if (cost := compiled.cost_analysis()) is not None:
        return cost
    # XLA's GPU client has no cost analysis without a GPU, but any client counts any program.
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    (module,) = compiled.runtime_executable().hlo_modules()
    return _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)


def matmul_workspace(gpu: Gpu) -> int:
    """Bytes of cuBLAS's workspace, which XLA allots where its autotuning takes cuBLAS."""
    return (32 if gpu.capability >= 9 else 4) * 2**20


def extrapolate_layers(first: float, second: float, more: int) -> float:
    """Cost of a model with so many more layers than the first, from its cost and that of one more layer.

    >>> extrapolate_layers(10.0, 13.0, 3)
    19.0
    """
    return first + more * (second - first)


def replace_depth(base: BaseModel, layers: int) -> BaseModel:
    """The same model with another number of layers, unrolled."""
    # Unrolled, since XLA's cost analysis counts the body of a loop once.
    model: Any = base.model
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    return base._replace(model=model.clone(config=config, unroll=True), layers=layers if base.layers else 0)


def head_bytes(settings: Settings, parts: AdaptedModel, mesh: Mesh) -> float:
    """Extra bytes that a micro-batch's loss reads in chunks: each chunk after the first reads the head twice."""
    if not settings.is_language or not head_is_frozen(parts):
        return 0.0
    kernel, transposed = head_kernel(params_of(parts))
    vocabulary = kernel.shape[0 if transposed else 1]
    tensor = mesh.shape["tensor"] if vocabulary % mesh.shape["tensor"] == 0 else 1
    rows = settings.train.batch_size // settings.train.accumulate
    chunk = max(1, settings.model.loss_chunk * batch_parts(mesh) // rows)
    chunks = -(-settings.data.max_length // chunk)
    return (chunks - 1) * 2 * kernel.size * jnp.dtype(settings.model.dtype).itemsize / tensor


def roofline(chip: Chip, work: Work, exchanges: Sequence[Collective]) -> dict[str, float]:
    """Lower bounds on the seconds of a step: compute, memory and network, each as if it were the only limit.

    A collective among GPUs of several hosts runs at the rate of the network between hosts.
    """
    return {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.memory_rate,
        "network": sum(one.times * one.wire_bytes / chip.rate_between(one.hosts) for one in exchanges),
    }


def _available_bytes(chip: Chip | None, mesh: Mesh) -> int:
    if chip is not None:
        return chip.available
    device = mesh.devices.flat[0]
    shares = len(mesh.local_devices) if device.platform == "cpu" else 1  # CPU devices share the host's memory
    return free_bytes(device) // shares
