"""How the loss of another process looks."""

import jax
import pytest
from jax.errors import JaxRuntimeError

from loraplus_jax._utils.multihost import is_lost_process


@pytest.mark.parametrize(
    ("processes", "error", "lost"),
    [
        (2, JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (2, JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (2, ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (2, TimeoutError("orbax waited"), True),
        (2, JaxRuntimeError("INTERNAL: a kernel does not compile: opt-barrier"), False),
        (2, JaxRuntimeError("RESOURCE_EXHAUSTED: while all-reducing over a connection"), False),
        (2, ValueError("connection"), False),
        (1, JaxRuntimeError("UNAVAILABLE: Socket closed"), False),
    ],
)
def test_only_errors_that_another_process_can_cause_count_as_its_loss(monkeypatch, processes, error, lost):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert is_lost_process(error) == lost
