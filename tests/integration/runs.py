"""Command lines of whole runs, what these leave and print, and how they are disturbed or run in another process."""

import contextlib
import html.parser
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep.report import format_number, format_steps
from loraplus_jax.training import trainer
from loraplus_jax.training.metrics_log import RunLog
from loraplus_jax.training.trainer import Trainer

from ..messages import assert_mentions


def flags(text):
    """Words of a command line, as a shell splits them."""
    return tuple(shlex.split(text))


def last_of(*words):
    """Words of a command line, with each setting once: a test's come after those of its world."""
    others, settings, rest = [], {}, iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name[:2] != "--" or name in ("--fresh", "--allow_different"):
            others.append(word)
        else:
            settings[name] = [word, *itertools.islice(rest, not equals)]
    return [*others, *itertools.chain(*settings.values())]


SHORT = flags("--train.steps 8 --train.eval_every 4 --train.log_every 2")
NO_PROMPT = flags("--train.prompt null --train.prompt_tokens 64")
# An epsilon far above rounding: else Adam makes whole steps of gradients that are all but zero.
SHORT_TALK = (*NO_PROMPT, *SHORT, "--optimizer.eps", "1e-3")
MESH = flags("--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2")
PROMPT = "say what colour is snow"
ASKED = ("--prompt", PROMPT, "--max_tokens", "8")
# Rows, evaluations and stops fall on different steps; dropout, shuffling and accumulation are on.
ODD = flags(
    "--train.steps 20 --train.eval_every 6 --train.log_every 4 --train.accumulate 2"
    " --model.dropout 0.1 --lora.dropout 0.1 --model.head_dropout 0.1"
)


# what a run leaves


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def report_of(out):
    return json.loads((out / "report.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(out):
    """The rows of metrics, without times."""
    return [
        {name: value for name, value in row.items() if name != "steps_per_second"}
        for row in lines_of(out / "metrics.jsonl")
    ]


def column(out, name):
    return {row["step"]: row[name] for row in rows_of(out) if name in row}


def tensors_of(out):
    return load_file(out / "adapter/adapter.safetensors")


def tensor_bytes(out):
    return (out / "adapter/adapter.safetensors").read_bytes()


def result_of(out):
    """All that must not depend on interruptions: the adapter, the rows and the summary."""
    return tensor_bytes(out), rows_of(out), summary_of(out) | {"seconds": 0, "digest": ""}


def saved_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_losses(out, expected, **tolerance):
    assert column(out, "loss") == pytest.approx(column(expected, "loss"), **(tolerance or {"rel": 1e-4}))


def cut_short(checkpoint):
    """Halves every file of the arrays of a checkpoint, or of all checkpoints."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size and "state" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# what commands print


def printed(capsys, *arguments):
    """What a command prints; it must end well."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def rejected(capsys, *arguments):
    """What a command complains of, in one line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out = capsys.readouterr()
    assert not out.out
    assert out.err.count("\n") == 1
    return out.err


def evaluated(capsys, *arguments):
    return json.loads(printed(capsys, "eval", *arguments))


def near(given, wanted, rel=1e-4):
    """Whether two evaluations say the same."""
    assert given.keys() == wanted.keys()
    numbers = [name for name, value in wanted.items() if isinstance(value, float)]
    return {n: given[n] for n in numbers} == pytest.approx({n: wanted[n] for n in numbers}, rel=rel)


# runs that are disturbed


def undisturbed(first_world, tmp_path_factory, settings):
    """The directory of a run of its own that nothing disturbs."""
    world = first_world.copy(tmp_path_factory.mktemp("straight"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_loss", lambda *_: None)
        return world.trained(*settings)


def interrupt_at(patch, step):
    """Ctrl-C at the first row that is logged at a step or later, as a kill would be: nothing is saved."""
    write = RunLog.write

    def interrupted(self, at, values):
        if at >= step:
            raise KeyboardInterrupt
        write(self, at, values)

    patch.setattr(RunLog, "write", interrupted)


def interrupted(world, step, *args):
    """The directory of a run that `interrupt_at` ends."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        assert world.train(*args) == 130
    return world.out


def at_step(patch, step, act, *, saved=False):
    """Calls `act` while that step's batch is being fetched; with `saved` once all running saves are done."""
    loop = Trainer.loop

    def with_act(self, first):
        run, manager = self.run, self.manager

        def batch(seed, before):
            if before + 1 == step:
                if saved:
                    manager.wait_until_finished()
                act()
            return run.batches.batch(seed, before)

        self.run = run._replace(batches=run.batches._replace(batch=batch))
        return loop(self, first)

    patch.setattr(Trainer, "loop", with_act)


def stopped(world, step, *args, number=signal.SIGTERM, saved=False):
    """The directory of a run that a signal stops at a step, after which it saves."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number), saved=saved)
        assert world.train(*args) == 128 + number
    return world.out


# the command line in a process of its own

DEADLINE = 300
# Small programs are kept too, and are compiled in a hurry.
QUICK = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def train_command(world, out, *args):
    start = [sys.executable, "-m", "loraplus_jax.cli", "train", str(world.config)]
    return [*start, *last_of("--output_dir", str(out), *args)]


@contextlib.contextmanager
def started(*command, **environment):
    """A process at work; whatever happens, it ends with the test."""
    with subprocess.Popen(command, env=os.environ | QUICK | environment, **PIPES) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process, within=DEADLINE):
    """Exit code, stdout and stderr."""
    stdout, stderr = process.communicate(timeout=within)
    return process.returncode, stdout, stderr


def finished_process(*command, **environment):
    with started(*command, **environment) as process:
        return ended(process)


def wait_until(condition, *processes):
    """Until it holds; a process that has ended will not make it hold."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert all(process.poll() is None for process in processes), [ended(p) for p in processes]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def assert_one_error(ending, *words):
    """A process ended with code 2 and one line that mentions the words."""
    code, _, stderr = ending
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert stderr.startswith("loraplus: error: ")
    assert_mentions(stderr, *words)


class Page(html.parser.HTMLParser):
    """The numbers of a page as `(path, value, text)`, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.loads, self.text, self._open = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "data":
            self._open = [attributes["data-path"], json.loads(attributes["value"]), ""]

    def handle_data(self, data):
        self.text += data
        if self._open:
            self._open[2] += data

    def handle_endtag(self, tag):
        if tag == "data":
            self.numbers.append(tuple(self._open))
            self._open = None

    def check(self, report):
        """Every number is one of the report."""
        for path, value, text in self.numbers:
            found = report
            for part in path.split("."):
                found = found[int(part) if isinstance(found, list) else part]
            assert value == found, path
            assert text in (format_number(value), format_number(value, sign=True), format_steps(value)), path
