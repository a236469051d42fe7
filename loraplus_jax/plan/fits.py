"""Which GPUs a training step fits on: all known ones, 1 to 8 of them, with the weights as they are and quantized.

A step is compiled once for each number of GPUs and each kind of weights. Its memory hardly depends on the GPU: only
where the answer is close, the step is compiled for that GPU too.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..settings.schema import MeshSettings, Settings
from ..step.sharding import make_mesh
from ..training.setup import batch_sizes_for
from .devices import GPUS, MAX_FRACTION, Gpu, restore_targets, target_devices
from .plan import check_layout, compile_step, make_model, matmul_workspace
from .programs import bytes_between_steps

COUNTS = (1, 2, 4, 8)
"""Numbers of GPUs."""
COMPILED_FOR = "h100"
"""The GPU that a step is compiled for first."""
CLOSE = 0.05
"""Where memory and need differ by less than this part of the memory, the step is compiled for the GPU itself."""


class Fit(NamedTuple):
    """Whether a step fits on some GPUs of a kind.

    Attributes:
      gpu: their name.
      number: how many they are.
      quantize: `model.quantize`.
      needed: bytes that each needs.
      limit: bytes that JAX can reserve of each.
      available: bytes that JAX reserves of each by default, or by the environment.
      exact: whether the step was compiled for this GPU.
      problem: the compiler's message if it ran out of memory.
    """

    gpu: str
    number: int
    quantize: str
    needed: int
    limit: int
    available: int
    exact: bool
    problem: str | None

    @property
    def fits(self) -> bool:
        """Whether the step compiles and what it needs can be reserved."""
        return self.problem is None and self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Fits:
    """The answers for a config.

    Attributes:
      settings: settings by number of GPUs, with the mesh and the batch sizes that they need.
      fits: the answers.
      seconds: time that all took.
    """

    settings: dict[int, Settings]
    fits: list[Fit]
    seconds: float


def find_fits(settings: Settings, say: Callable[[str], None]) -> Fits:
    """Compiles a step for each number of GPUs, with the weights as they are and as NF4, split over all of them.

    Args:
      settings: settings of the run, as for `make_plan`; the mesh is replaced.
      say: takes lines of progress.

    Raises:
      ValueError, OSError: settings that training would reject too.
      ImportError: the GPU compiler is not installed.
    """
    start = time.perf_counter()
    with restore_targets():
        fits = [
            fit
            for variant in _variants(settings)
            for count in COUNTS
            for fit in _fits_on(split_over(variant, count), count, say)
        ]
    return Fits({count: split_over(settings, count) for count in COUNTS}, fits, time.perf_counter() - start)


def split_over(settings: Settings, count: int) -> Settings:
    """The settings with weights and batch split over `count` devices; batch sizes are rounded up to multiples."""
    train = settings.train
    sizes = batch_sizes_for(train.batch_size, train.accumulate, train.eval_batch_size, count)
    return dataclasses.replace(
        settings, train=dataclasses.replace(train, **sizes), mesh=MeshSettings(data=1, fsdp=count)
    )


def _variants(settings: Settings) -> Iterator[Settings]:
    """The settings, and the same with weights in the other form, quantized or not, if they allow it."""
    yield settings
    other = "nf4" if settings.model.quantize == "none" else "none"
    # Training all weights needs them as they are, and some initial values need them quantized.
    with contextlib.suppress(ValueError):
        yield dataclasses.replace(settings, model=dataclasses.replace(settings.model, quantize=other))


def _fits_on(settings: Settings, count: int, say: Callable[[str], None]) -> Iterator[Fit]:
    """The answers for one number of GPUs and kind of weights."""
    typical, failure = _bytes_needed(settings, GPUS[COMPILED_FOR], count, say)
    for gpu in GPUS.values():
        limit = max(gpu.available, int(MAX_FRACTION * gpu.memory))
        is_close = failure is not None or any(
            abs(typical - size) < CLOSE * gpu.memory for size in (limit, gpu.available)
        )
        exact = is_close or gpu.name == COMPILED_FOR
        again = is_close and gpu.name != COMPILED_FOR
        needed, problem = _bytes_needed(settings, gpu, count, say) if again else (typical, failure)
        yield Fit(gpu.name, count, settings.model.quantize, needed, limit, gpu.available, exact, problem)


def _bytes_needed(
    settings: Settings, gpu: Gpu, count: int, say: Callable[[str], None]
) -> tuple[int, str | None]:
    """What a GPU needs, as far as the compiler says, and the compiler's message if it ran out of memory."""
    _, devices = target_devices(f"{gpu.name}:{count}")
    mesh = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    base, task = make_model(settings)
    check_layout(settings, base, mesh)
    say(f"compiling for {gpu.name}:{count}, model.quantize {settings.model.quantize}")
    compiled = compile_step(settings, base, task, mesh, gpu)
    train, needed, problems = settings.train, [compiled.needed], [compiled.problem]
    # An evaluation of no more rows keeps less: nothing for a backward pass.
    if train.eval_batch_size > train.batch_size // train.accumulate or train.theory_every is not None:
        between = bytes_between_steps(settings, compiled.step, matmul_workspace(gpu))
        needed += [size or 0 for size, _ in between.values()]
        problems += [problem for _, problem in between.values()]
    return max(needed), next(filter(None, problems), None)
