"""What a command reads back is what was written, of the same base and data: else an error, or the same result.

There is no list of files: each file of a run or export has a bit changed, so a new one is covered at once.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep import method_comparison
from loraplus_jax.sweep.run import Sweep

from ..marks import long
from . import language_world as language
from .runs import NO_PROMPT, SHORT_TALK, flags, interrupt_at, printed, rejected, report_of
from .test_methods import compare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

SHORT = (*SHORT_TALK, "--lora.rank", "4")
SWEEP = flags(
    "--sweep.learning_rates [2e-3,5e-3] --sweep.lr_ratios [4] --sweep.report_seeds 2 --sweep.rungs [0.5]"
    " --sweep.keep 0.5 --train.steps 8 --train.eval_every 4"
)
NOT_READ = {"checkpoints", "tensorboard", ".lock"}
"""Parts of a run without a change here: tests/fuzz/test_checkpoints.py has the checkpoints."""


def describe(talk):
    """Runs of this task keep the texts from before training."""
    talk.describe(beams=1, max_new_tokens=4, inputs=2, batch_size=2)


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


BEHIND = {"base.weights": edit_a_projection, "data": swap_answers, "tokenizer": edit_tokenizer}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A run at a stage: how to get there, the next command, what that leaves, and what is changed."""

    begin: Callable  # (world, patch): until it is interrupted
    resume: Callable  # (world): the exit code
    result: Callable  # (world): what must not change
    behind: tuple[str, ...]
    files: str = "**/*"


def adapter(world):
    files = [world.out / "adapter/adapter.safetensors", *world.out.glob("generated*.jsonl")]
    return [file.read_bytes() for file in files]


def train(*flags, stop, behind, files="**/*", prepare=lambda world: None):
    """A run that was killed before it logged a step."""

    def begin(world, patch):
        prepare(world)
        interrupt_at(patch, stop)
        assert world.train(*flags) == 130

    return Kind(begin, lambda world: world.train(*flags), adapter, behind, files)


def sweep(world):
    return main(["sweep", str(world.config), "--output_dir", str(world.out), *SWEEP, *NO_PROMPT])


def runs(world):
    """The report without seconds and digest."""
    return report_of(world.out)["runs"]


def stopped_sweep(world, patch):
    def stop(self):
        raise KeyboardInterrupt

    patch.setattr(Sweep, "report_stage", stop)
    assert sweep(world) == 130


def stopped_methods(world, patch):
    begin = method_comparison.MethodSweep.open

    def stop(self):
        if self.run.name == "lora_plus":
            raise KeyboardInterrupt
        begin(self)

    patch.setattr(method_comparison.MethodSweep, "open", stop)
    assert resume_methods(world) == 130


def resume_methods(world):
    return compare(world, *NO_PROMPT, methods="[lora_plus]")


KINDS = {
    "pissa, before a checkpoint": train(*SHORT, "--lora.init", "pissa", stop=2, behind=(*BEHIND,)),
    "texts": train(*SHORT, stop=6, behind=("data",), files="generated*", prepare=describe),
    "methods": Kind(stopped_methods, resume_methods, runs, ("base.weights",), files="no file"),
    "sweep": Kind(stopped_sweep, sweep, runs, (*BEHIND,)),
}


def files_of(directory, pattern="**/*"):
    return [
        path.relative_to(directory)
        for path in sorted(directory.glob(pattern))
        if path.is_file() and not NOT_READ & set(path.relative_to(directory).parts) and path.stat().st_size
    ]


def change_a_bit(path: Path):
    """Of a digit where there is one: then JSON stays valid."""
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    binary = path.suffix == ".safetensors"
    content[random.Random(path.name).choice(range(len(content)) if binary or not digits else digits)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [long(name) if name == "sweep" else name for name in KINDS])
def test_what_is_changed_under_a_stopped_run_is_an_error_or_changes_nothing(talk, capsys, name):
    kind, backup = KINDS[name], talk.directory.with_name("backup")
    with pytest.MonkeyPatch.context() as patch:
        kind.begin(talk, patch)
    shutil.copytree(talk.directory, backup)

    def restore():
        shutil.rmtree(talk.directory)
        shutil.copytree(backup, talk.directory)

    for part in kind.behind:
        BEHIND[part](talk)
        capsys.readouterr()
        assert kind.resume(talk) == 2, part
        error = capsys.readouterr().err
        assert part in error, (part, error)
        assert f"--allow_different {part}" in error
        restore()
    if name == "texts":  # which alone has a checkpoint
        with jax.default_matmul_precision("highest"):
            assert kind.resume(talk) == 2
        assert "jax_default_matmul_precision" in capsys.readouterr().err
    if not (files := files_of(talk.out, kind.files)):
        return
    assert kind.resume(talk) == 0
    straight, silent = kind.result(talk), []
    for saved in (*backup.glob("out/start/*"), *backup.glob("out/generated*")):  # nothing is made again
        assert saved.stat().st_mtime_ns == (talk.out / saved.relative_to(backup / "out")).stat().st_mtime_ns
    for file in files:
        restore()
        change_a_bit(talk.out / file)
        capsys.readouterr()
        code = kind.resume(talk)
        error = capsys.readouterr().err
        if not ((code == 2 and str(talk.out) in error) or (code == 0 and kind.result(talk) == straight)):
            silent.append((str(file), code, error))
    assert not silent


def evaluate(where, capsys):
    capsys.readouterr()
    code = main(["eval", str(where)])
    text = capsys.readouterr()
    return code, text.out, text.err


@pytest.mark.parametrize("export", [None, "peft", "merged"])
def test_a_changed_bit_of_a_result_is_an_error_or_changes_nothing(run_of, capsys, export):
    where = run_of("chat").export(export) if export else run_of("chat").straight
    _, straight, _ = evaluate(where, capsys)
    silent = []
    for file in files_of(where):
        saved = (where / file).read_bytes()
        change_a_bit(where / file)
        code, out, error = evaluate(where, capsys)
        if not ((code == 2 and error) or (code == 0 and out == straight)):
            silent.append((str(file), code, error))
        (where / file).write_bytes(saved)
    assert not silent


def test_a_small_change_of_an_unquantized_weight_is_not_merged(run_of, tmp_path, capsys):
    run = run_of("nf4")

    def change(tensors):
        weight = tensors["model.layers.0.self_attn.q_proj.weight"]
        weight[0, abs(weight[0]).argmin()] += 1e-4  # to the same code

    saved = (run.finished.model / "model.safetensors").read_bytes()
    run.finished.change_tensors(change)
    assert main(["eval", str(run.straight)]) == 0
    command = ("export", run.straight, "--merged", "--to", tmp_path / "merged")
    assert "--allow_different base.unquantized" in rejected(capsys, *command)
    assert not (tmp_path / "merged").exists()
    printed(capsys, *command, "--allow_different", "base.unquantized")
    (run.finished.model / "model.safetensors").write_bytes(saved)
