"""Eight virtual CPU devices in every test run, rank promotion is an error, and compiled programs are kept."""

import gc
import json
import os
import re
import resource
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling is most of what tests do: workers, later runs and processes that tests start share one cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

jax.config.update("jax_numpy_rank_promotion", "raise")


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
        COMPILED.append(seconds) if event.endswith("backend_compile_duration") else None
    )
)


def pytest_addoption(parser):
    parser.addoption(
        "--costs", type=Path, help="JSON file for the CPU seconds and compiled programs of each test"
    )


def _spent():
    """CPU seconds of this process and of its ended children."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.stash["before"] = _spent(), len(COMPILED)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    yield
    seconds, programs = item.stash["before"]
    item.user_properties.append(("cost", (round(_spent() - seconds, 3), len(COMPILED) - programs)))


def pytest_terminal_summary(terminalreporter):
    """What to choose the quick suite by: `pytest --costs=costs.json`, most expensive first."""
    if path := terminalreporter.config.option.costs:
        costs = {
            report.nodeid: cost
            for reports in terminalreporter.stats.values()
            for report in reports
            if getattr(report, "when", None) == "teardown"
            if (cost := dict(report.user_properties).get("cost"))  # doctests of the package have none
        }
        rows = [
            f"{json.dumps(name)}: {json.dumps(cost)}"
            for name, cost in sorted(costs.items(), key=lambda row: -row[1][0])
        ]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def pytest_configure(config):
    """Compiling is most of what tests do. Slow tests in `.ci/run --all` see the programs that users run."""
    if "not long" in config.option.markexpr:
        jax.config.update("jax_disable_most_optimizations", True)


ALL_SLOW = re.compile(r"^pytestmark = \[?.*pytest\.mark\.slow\b", flags=re.M)


def pytest_ignore_collect(collection_path, config):
    """Helpers have no doctests, and the quick suite needs no file whose tests are all slow: none is imported."""
    if collection_path.suffix != ".py":
        return None
    is_quick = "not slow" in config.option.markexpr
    text = collection_path.read_text(encoding="utf-8") if is_quick else ""
    return not collection_path.name.startswith("test_") or bool(ALL_SLOW.search(text)) or None


def pytest_collection_finish():
    """Tracing makes many small objects, and collections that walk over all modules took a tenth of the CPU time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: a file stays on one worker, and the others go on meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


@pytest.fixture
def optimized():
    """Compiles as users do."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def no_own_cache(tmp_path, monkeypatch):
    """JAX without the cache above: commands then have theirs, here in `tmp_path / "xla"`."""
    monkeypatch.setenv("LORAPLUS_CACHE", str(tmp_path))
    options = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 1.0}
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        reset_cache()  # JAX opens a cache once
        if values is options:
            yield


@pytest.fixture
def ten_seconds():
    """Fails the test after ten seconds, for what would otherwise wait forever."""

    def stop(*_):
        pytest.fail("it takes more than ten seconds")  # no Exception, which code under test may catch

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Compiled programs of a module are of no use to the next one, and would fill gigabytes."""
    yield
    jax.clear_caches()
