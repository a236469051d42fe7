"""What every kind of run is proved to do, and the tables that say which proof runs in which suite."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from loraplus_jax.cli.commands import main

from ..marks import long, slow
from .kinds import said
from .runs import column, interrupted, near, result_of, summary_of, tensors_of


def learns(run):
    """The loss falls, and what else the kind promises is true."""
    assert run.summary["after"]["loss"] < run.kind.falls * run.summary["before"]["loss"]
    run.kind.extra(run)


def resumes(run):
    """An interrupted run that its own config continues ends with the bits of the straight one.

    Nothing is compiled again, and nothing that was saved is made again.
    """
    world, straight = run.fresh(), result_of(run.straight)
    out = interrupted(world, run.kind.stop, *run.kind.flags)
    saved = {path: path.stat().st_mtime_ns for path in (*out.glob("start/*"), *out.glob("generated_*"))}
    programs = compiled()
    assert programs
    assert main(["train", str(out / "config.yaml")]) == 0
    assert compiled() == programs
    assert result_of(out) == straight
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    for path in (*run.straight.glob("start/*"), *run.straight.glob("generated*")):
        assert (out / path.relative_to(run.straight)).read_bytes() == path.read_bytes()


def compiled():
    """The programs that are kept in the cache, but for the checksums of what a run restores."""
    kept = Path(jax.config.values["jax_compilation_cache_dir"]).glob("*-cache")
    return {path.name for path in kept if "checksum" not in path.name}


def devices(run):
    """Eight devices have the losses of one."""
    straight, out = run.straight, run.fresh().trained(*run.kind.flags, *run.kind.otherwise)
    for name in ("loss", "validation/loss"):
        found = column(out, name)
        expected = {step: loss for step, loss in column(straight, name).items() if step in found}
        assert found == pytest.approx(expected, rel=run.kind.rel)


def exports(run):
    """An evaluation repeats the summary; exports evaluate and answer as the run does."""
    after = run.summary["after"]
    assert {n: run.exact[n] for n in after} == pytest.approx(after, rel=1e-5)
    for name in run.kind.exports:
        assert near(json.loads(said("eval", run.export(name))), run.exact, rel=1e-5)
        if name in run.kind.answers:
            assert run.answer(run.export(name)) == run.answer()


def restarts(run):
    """A run starts from this one and from its export, that of a language model as PEFT would have written it."""
    peft = run.export("peft")
    if run.kind.first == "first_talk":
        notes = ("loraplus.json", "README.md")
        peft = shutil.copytree(peft, run.directory / "of_peft", ignore=lambda *_: notes)
    ends = []
    for start in (run.straight, peft):
        world = run.fresh()
        out = world.trained(*run.kind.flags, "--init_adapter", str(start), "--train.steps", "3")
        assert summary_of(out)["before"]["loss"] == pytest.approx(run.exact["loss"], rel=1e-5)
        ends.append(tensors_of(out))
    assert ends[0].keys() == ends[1].keys()
    for name, end in ends[0].items():
        np.testing.assert_array_equal(end, ends[1][name])


PROPERTIES = {prove.__name__: prove for prove in (learns, resumes, devices, exports, restarts)}
SUITES = {"quick": pytest.param, "slow": slow, "long": long}


def cells(table):
    """A table's proofs: a row for each kind, a column for each property, in a cell its suite, or a dash."""
    head, *rows = (line.split() for line in table.strip().splitlines())
    return [
        SUITES[suite](kind, PROPERTIES[name])
        for kind, *suites in rows
        for name, suite in zip(head, suites, strict=True)
        if suite != "-"
    ]
