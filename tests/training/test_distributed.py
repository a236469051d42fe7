"""Where the coordinator listens, and which GPUs of the hosts a run leaves idle."""

import socket
from types import SimpleNamespace

import jax
import pytest

from loraplus_jax.settings.schema import DistributedSettings
from loraplus_jax.training import distributed
from loraplus_jax.training.distributed import idle_gpus, join_processes

from ..messages import assert_mentions, mentions


def join(monkeypatch, host, port):
    """The arguments with which process 0 of 2 calls JAX, and the error."""
    given = {}

    def initialize(**arguments):
        given.update(arguments)
        raise RuntimeError("not joined")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    settings = DistributedSettings(coordinator=f"{host}:{port}", processes=2, process_id=0)
    with pytest.raises(ValueError, match="coordinator") as caught, join_processes(settings):
        pass
    return given, str(caught.value)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "address", "bound"),
    [
        ("localhost", None, True),
        ("127.0.0.1", None, True),
        ("host0", "0.0.0.0", True),  # stands for an address of this host
        ("host0", "127.0.1.1", False),  # by a hosts file
        ("host0", "203.0.113.77", False),  # of no host: translated on the way
    ],
)
def test_the_coordinator_listens_at_the_named_address_only(monkeypatch, port, host, address, bound):
    if address is not None:
        target = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [target])
    given, _ = join(monkeypatch, host, port)
    assert given["coordinator_bind_address"] == (f"{host}:{port}" if bound else None)


def test_jaxs_own_variable_overrides_the_bind_address(monkeypatch, port):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    assert join(monkeypatch, "host0", port)[0]["coordinator_bind_address"] == f"0.0.0.0:{port}"


def test_a_host_that_has_no_address_is_named(monkeypatch, port):
    given, message = join(monkeypatch, "nosuch.invalid", port)
    assert not given
    assert_mentions(message, "distributed.coordinator", f"nosuch.invalid:{port}", "process 0 of 2")


def test_an_environment_that_names_no_coordinator_is_rejected(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    words = ("distributed.coordinator is auto", "environment", "coordinator_address", "process_id")
    with (
        pytest.raises(ValueError, match=mentions(*words)),
        join_processes(DistributedSettings(coordinator="auto")),
    ):
        pass


def test_the_port_of_another_run_is_not_shared(monkeypatch):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as JAX's coordinator does
        other.bind(("localhost", 0))
        other.listen()
        given, message = join(monkeypatch, "localhost", other.getsockname()[1])
    assert not given
    assert_mentions(message, "distributed.coordinator", "free port")


@pytest.mark.parametrize(
    ("slurm", "visible", "line"),
    [
        ("8", {"node1": [1], "node2": [1]}, ["2 of 16", "node1 1 of 8", "node2 1 of 8"]),
        ("8", {"node1": [1] * 8, "node2": [1] * 7}, ["15 of 16", "node2 7 of 8"]),
        ("8", {"node1": [1] * 8, "node2": [8]}, None),
        (None, {"node1": [1]}, ["1 of 2", "node1 1 of 2"]),  # by the device files
        (None, {"node1": [1, 1]}, None),
        ("1", {"node1": [1]}, None),  # the job got one of the two
    ],
)
def test_gpus_that_no_process_of_a_host_sees_are_counted(tmp_path, monkeypatch, slurm, visible, line):
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", slurm)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])

    def allgather(value):
        assert value[:2] == [socket.gethostname(), 1]
        return [[host, gpus, value[2]] for host, processes in visible.items() for gpus in processes]

    monkeypatch.setattr(distributed, "allgather", allgather)
    lines = idle_gpus()
    assert len(lines) == (line is not None)
    if line is not None:
        assert_mentions(lines[0], *line, "JAX_LOCAL_DEVICE_IDS")
