"""A sweep on Ray, started on this machine: workers and the driver may be lost, and the report is the same."""

import contextlib
import shutil
import signal
import sys

import psutil
import pytest

from ..marks import long
from ..messages import assert_mentions
from .runs import assert_one_error, ended, finished_process, flags, last_of, started, wait_until

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TINY = flags(
    "--sweep.learning_rates [2e-3] --sweep.lr_ratios [2] --sweep.report_seeds 2 --sweep.rungs [0.25]"
    " --sweep.keep 1e-3 --sweep.control false --sweep.curve_points 1 --train.steps 40 --train.eval_every 5"
)
RAY = ("--sweep.ray", "local")


def command(world, *options):
    """A sweep of the world; the report holds its path."""
    start = [sys.executable, "-m", "loraplus_jax.cli", "sweep", str(world.config)]
    return [*start, *last_of("--output_dir", str(world.out), *TINY, *options)]


def report_bytes(world):
    return (world.out / "report.json").read_bytes()


def workers_of(parent):
    """The processes below another that run a unit."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith("ray::run_on_worker"):
                found.append(process)
    return found


def listening(parent):
    """The addresses on which a process and those below it listen."""
    process = psutil.Process(parent)
    family = {process.pid, *(child.pid for child in process.children(recursive=True))}
    connections = psutil.net_connections(kind="inet")
    found = {c.laddr.ip for c in connections if c.pid in family and c.status == psutil.CONN_LISTEN}
    return {address.removeprefix("::ffff:") for address in found}


def has_saved(world):
    # Of a sweep or of one of its methods; not "**", which enters directories that another process just renames.
    units = (world.out / "units", *world.out.glob("*/units"))
    return any(path.name.isdigit() for unit in units for path in unit.glob("*/checkpoints/*"))


def finish(world, *options):
    code, printed, error = finished_process(*command(world, *options))
    assert (code, error) == (0, "")
    return printed


def test_killed_workers_and_a_killed_driver_change_no_byte_of_the_report(world, monkeypatch):
    # On one core each worker has one device of one thread, and so has this process.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    finish(world, "--sweep.group_size", "1")
    straight = report_bytes(world)
    shutil.rmtree(world.out)

    with started(*command(world, *RAY)) as driver:
        wait_until(lambda: has_saved(world) and workers_of(driver.pid), driver)
        assert listening(driver.pid) <= {"127.0.0.1", "::1"}
        assert listening(driver.pid)
        for worker in workers_of(driver.pid):
            worker.send_signal(signal.SIGKILL)
        wait_until(lambda: list(world.out.glob("units/search-*/result.json")), driver)
        driver.kill()
    results = {path: path.stat().st_mtime_ns for path in world.out.glob("units/*/result.json")}
    finish(world, *RAY)
    assert report_bytes(world) == straight
    assert {path: path.stat().st_mtime_ns for path in results} == results  # not run again
    assert not list(world.out.glob("units/*/checkpoints"))


@pytest.mark.long
def test_ctrl_c_lets_workers_save_and_fresh_respects_a_running_sweep(world):
    with started(*command(world, *RAY)) as driver:
        wait_until(lambda: has_saved(world) and workers_of(driver.pid), driver)
        assert_one_error(finished_process(*command(world, *RAY, "--fresh")), world.out, "in use", driver.pid)
        driver.send_signal(signal.SIGINT)
        code, _, error = ended(driver)
    assert code == 130
    assert_mentions(error, "stopped", "rerun")
    assert error.count("\n") == 1
    finish(world, *RAY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sweep.ray", "127.0.0.1:1"), ("sweep.ray", "127.0.0.1:1", "ray start", "local")),
        long((*RAY, "--sweep.worker", "{GPU: 3}"), ("sweep.worker", "GPU 3", "CPU")),
    ],
)
def test_an_error_is_one_line_and_loses_nothing(world, options, words):
    assert_one_error(finished_process(*command(world, *options)), *words)
    assert not world.out.exists()


@pytest.mark.long
def test_a_worker_with_another_base_is_named(world):
    """Between the driver's reading and the worker's, the file changes: as if their hosts had two."""
    with started(*command(world, *RAY)) as driver:
        wait_until(lambda: (world.out / "members_at_once.json").exists(), driver)
        world.change_tensors(lambda tensors: tensors.update({name: x + 1 for name, x in tensors.items()}))
        assert_one_error(ended(driver), "worker", "base", "on the driver", "on this worker")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray forks this process
def test_a_worker_that_joins_late_gets_units(world, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with started(*command(world, "--sweep.ray", cluster.address)) as driver:
            wait_until(lambda: has_saved(world), driver)
            late = cluster.add_node(num_cpus=1)
            raylet = late.all_processes["raylet"][0].process.pid
            wait_until(lambda: workers_of(raylet), driver)
            code, _, error = ended(driver)
            assert (code, error) == (0, "")
    finally:
        cluster.shutdown()
