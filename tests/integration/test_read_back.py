"""What a command reads back is what was written, of the same base and data: else an error, or the same result.

There is no list of files: each file of a run, sweep or export has a bit changed, so a new one is covered at once.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep.run import Tuning

from ..marks import long
from . import language_world as language
from .runs import NO_PROMPT, SHORT_TALK, interrupt_at, interrupted, report_of
from .test_methods import compare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

SHORT = (*SHORT_TALK, "--lora.rank", "4")
PISSA = (*SHORT, "--lora.init", "pissa")
NF4 = (*SHORT, "--model.quantize", "nf4")
NOT_READ = {"checkpoints", "tensorboard", ".lock"}
"""Parts of a run without a change here: tests/fuzz/test_checkpoints.py has the checkpoints."""


def describe(talk):
    """Runs of this task keep the texts from before training."""
    talk.describe(beams=1, max_new_tokens=4, inputs=2, batch_size=2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A run at a stage: how to get there, the next command, and what that leaves."""

    begin: Callable  # (world, patch): until it is interrupted
    resume: Callable  # (world): the exit code
    result: Callable  # (world): what must not change


def adapter(world):
    files = [world.out / "adapter/adapter.safetensors", *world.out.glob("generated*.jsonl")]
    return [file.read_bytes() for file in files]


def train(*flags, stop, prepare=lambda world: None):
    """A run that was killed before it logged a step."""

    def begin(world, patch):
        prepare(world)
        interrupt_at(patch, stop)
        assert world.train(*flags) == 130

    return Kind(begin, lambda world: world.train(*flags), adapter)


def sweep(world):
    return compare(world, *NO_PROMPT, methods="[lora_plus,pissa]")


def numbers(world):
    """The report without seconds and digest."""
    return report_of(world.out)["runs"]


def stopped_sweep(world, patch):
    """With all results of one program, and the search's of another."""
    report_stage = Tuning.report_stage

    def stop(self):
        if self.name == "pissa":
            raise KeyboardInterrupt
        return report_stage(self)

    patch.setattr(Tuning, "report_stage", stop)
    assert sweep(world) == 130


KINDS = {
    "pissa, before a checkpoint": train(*PISSA, stop=2),
    "texts": train(*SHORT, stop=6, prepare=describe),
    "sweep": Kind(stopped_sweep, sweep, numbers),
    "full": train(*SHORT_TALK[:-2], "--method", "full", stop=6),
    "nf4": train(*NF4, stop=6),
}


def cases(*quick):
    return [name if name in quick else long(name) for name in KINDS]


@pytest.fixture
def stopped(talk, request):
    """A kind's world at its stage, and a function that restores it."""
    kind = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        kind.begin(talk, patch)
    backup = talk.directory.with_name("backup")
    shutil.copytree(talk.directory, backup)

    def restore():
        shutil.rmtree(talk.directory)
        shutil.copytree(backup, talk.directory)

    yield kind, talk, restore
    shutil.rmtree(backup)


def files_of(directory):
    return [
        path.relative_to(directory)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not NOT_READ & set(path.relative_to(directory).parts) and path.stat().st_size
    ]


def change_a_bit(path: Path):
    """Of a digit where there is one: then JSON stays valid."""
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    binary = path.suffix == ".safetensors"
    content[random.Random(path.name).choice(range(len(content)) if binary or not digits else digits)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("stopped", cases("pissa, before a checkpoint", "texts"), indirect=True)
def test_a_changed_bit_of_any_file_is_an_error_or_changes_nothing(stopped, capsys):
    kind, world, restore = stopped
    assert kind.resume(world) == 0
    straight = kind.result(world)
    restore()
    silent = []
    for file in files_of(world.out):
        change_a_bit(world.out / file)
        capsys.readouterr()
        code = kind.resume(world)
        error = capsys.readouterr().err
        if not ((code == 2 and str(world.out) in error) or (code == 0 and kind.result(world) == straight)):
            silent.append((str(file), code, error))
        restore()
    assert not silent


def swap_answers(world):
    """The data with other labels."""
    if (world.directory / "train.csv").exists():
        rows = [row | {"ref": row["ref"] + " now"} for row in language.descriptions()[:96]]
        world.write_rows("train.csv", rows)
        return
    rows = world.rows()
    world.write_rows("chats.jsonl", [row | {"output": "it is red"} for row in rows])


def edit_tokenizer(world):
    path = world.model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))


def edit_a_projection(world):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[name] = tensors[name] + 1

    world.change_tensors(change)


@pytest.mark.parametrize("stopped", cases("pissa, before a checkpoint", "texts", "sweep"), indirect=True)
def test_what_is_behind_a_stopped_run_is_the_same_when_it_resumes(stopped, capsys):
    kind, world, restore = stopped
    changes = {"base.weights": edit_a_projection, "data": swap_answers, "tokenizer": edit_tokenizer}
    if kind is KINDS["full"]:
        del changes["base.weights"]  # of which the checkpoint has all, trained
    for part, change in changes.items():
        change(world)
        capsys.readouterr()
        assert kind.resume(world) == 2, part
        error = capsys.readouterr().err
        assert part in error, (part, error)
        assert f"--allow_different {part}" in error
        restore()


def evaluate(world, where, capsys):
    capsys.readouterr()
    code = main(["eval", str(where)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("flags", "export"),
    [
        (SHORT, None),
        (SHORT, ()),
        (SHORT, ("--merged",)),
        long(NF4, ("--merged",)),
        long((*SHORT_TALK[:-2], "--method", "full"), None),
    ],
)
def test_a_changed_bit_of_a_result_is_an_error_or_changes_nothing(talk, tmp_path, capsys, flags, export):
    where = talk.trained(*flags)
    if export is not None:
        where = tmp_path / "exported"
        assert main(["export", str(talk.out), "--to", str(where), *export]) == 0
    _, straight, _ = evaluate(talk, where, capsys)
    silent = []
    for file in files_of(where):
        saved = (where / file).read_bytes()
        change_a_bit(where / file)
        code, out, error = evaluate(talk, where, capsys)
        if not ((code == 2 and error) or (code == 0 and out == straight)):
            silent.append((str(file), code, error))
        (where / file).write_bytes(saved)
    assert not silent


def test_a_small_change_of_an_unquantized_weight_is_not_merged(talk, tmp_path, capsys):
    talk.trained(*NF4)

    def change(tensors):
        weight = tensors["model.layers.0.self_attn.q_proj.weight"]
        block = abs(weight[0]).argmin()
        weight[0, block] += 1e-4  # to the same code

    talk.change_tensors(change)
    assert main(["eval", str(talk.out)]) == 0
    capsys.readouterr()
    assert main(["export", str(talk.out), "--merged", "--to", str(tmp_path / "merged")]) == 2
    assert "--allow_different base.unquantized" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    accept = ["--allow_different", "base.unquantized"]
    assert main(["export", str(talk.out), "--merged", "--to", str(tmp_path / "merged"), *accept]) == 0


def test_another_precision_on_resumption_is_an_error(talk, capsys, monkeypatch):
    import jax

    interrupted(talk, 6, *SHORT)
    with jax.enable_x64(True):
        assert talk.train(*SHORT) == 2
    assert "jax_enable_x64" in capsys.readouterr().err
