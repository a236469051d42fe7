"""What a worker needs by Ray's names, and what is said without Ray. `tests/integration/test_ray.py` runs sweeps."""

import sys

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep.ray_tasks import _join_cluster, worker_resources

from ..messages import assert_mentions, mentions
from ..refusals import refusals

LOGIN, GPUS = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}
TPUS = {"CPU": 208.0, "TPU": 4.0, "TPU-v5p-16-head": 1.0}


@pytest.mark.parametrize(
    ("worker", "nodes", "wanted"),
    [
        (None, [LOGIN], {"CPU": 1.0}),
        (None, [LOGIN, GPUS], {"CPU": 1.0, "GPU": 1.0}),
        (None, [LOGIN, TPUS], {"CPU": 1.0, "TPU": 4.0}),
        ({"CPU": 4.0}, [LOGIN, GPUS], {"CPU": 4.0}),
        ({"GPU": 2.0}, [LOGIN, GPUS], {"CPU": 1.0, "GPU": 2.0}),
        ({"TPU": 4.0, "TPU-v5p-16-head": 1.0}, [TPUS], {"CPU": 1.0, "TPU": 4.0, "TPU-v5p-16-head": 1.0}),
    ],
)
def test_the_resources_of_a_worker(worker, nodes, wanted):
    assert worker_resources(worker, nodes) == wanted


test_resources_that_no_node_has = refusals(
    (lambda: worker_resources({"GPU": 16.0}, [LOGIN, GPUS]), "sweep.worker", "GPU 16"),
    (lambda: worker_resources({"CPU": 100.0, "GPU": 1.0}, [LOGIN, GPUS]), "sweep.worker", "CPU 100, GPU 1"),
    (lambda: worker_resources({"CPU": 1.0}, []), "sweep.worker", "CPU 1"),
    (lambda: worker_resources({"memory": 1e9}, [GPUS | {"memory": 1e12}]), "sweep.worker", "memory"),
)


@pytest.mark.parametrize("address", ["ray://host:1", "cluster"])
def test_an_address_of_another_form_is_rejected(address):
    with pytest.raises(ValueError, match=mentions("sweep.ray", address, "auto", "HOST:PORT")):
        _join_cluster(None, address)


def test_without_ray_a_line_says_how_to_install_it(config, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    out = tmp_path / "out"
    assert main(["sweep", str(config), "--output_dir", str(out), "--sweep.ray", "auto"]) == 2
    error = capsys.readouterr().err
    assert_mentions(error, "sweep.ray", "pip install 'loraplus_jax[ray]'")
    assert error.count("\n") == 1
    assert not out.exists()
