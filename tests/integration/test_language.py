"""Whole runs with a tiny language model: training, evaluation and generation by the command line."""

import json
import re
import shlex
import shutil

import jax
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.tasks import causal_lm as language
from loraplus_jax.training import trainer

from ..marks import long, slow
from ..messages import assert_mentions
from ..pages import blocks
from . import language_world as tiny
from .kinds import said
from .properties import cells
from .runs import ASKED, NO_PROMPT, PROMPT, SHORT, column, evaluated, flags, printed, summary_of

pytestmark = pytest.mark.usefixtures("cache")

ONE = (*NO_PROMPT, "--train.steps", "3", "--train.log_every", "1")
CELLS = """
         learns  resumes  devices  exports  restarts
llama    quick   -        long     -        -
chat     slow    -        -        slow     long
packed   slow    long     -        -        -
nf4      slow    -        slow     slow     -
dora     long    -        -        long     -
pissa    slow    slow     -        slow     -
lora_ga  slow    -        slow     -        -
loftq    long    -        -        -        -
adalora  slow    slow     -        slow     -
"""


@pytest.mark.parametrize(("kind", "prove"), cells(CELLS))
def test_kind(kind, prove, run_of, undrawn):
    prove(run_of(kind))


def answers_of(capsys, *args):
    """What `loraplus generate` prints, the answers alone."""
    text = printed(capsys, "generate", *args)
    assert text.endswith("\n\n")
    return [block.partition("\n")[2] for block in text[:-2].split("\n\n")]


@pytest.mark.slow
def test_eval_of_another_split_and_another_file(finished_talk, tmp_path, capsys):
    found = evaluated(capsys, str(finished_talk.out), "--split", "validation")
    selected = summary_of(finished_talk.out)["selected_step"]
    assert found["loss"] == pytest.approx(column(finished_talk.out, "validation/loss")[selected], rel=1e-5)
    file = tmp_path / "other.json"
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "it is green"}]
    file.write_text(json.dumps([{"messages": turns}] * 3))
    wrong = evaluated(capsys, str(finished_talk.out), "--data", str(file))
    assert (wrong["data"], wrong["examples"]) == (str(file), 3)
    assert wrong["loss"] > found["loss"]
    assert main(["eval", str(finished_talk.out), "--data", str(finished_talk.model / "config.json")]) == 2
    assert "config.json" in capsys.readouterr().err


# generation


@pytest.mark.slow
def test_generate_with_a_model_as_it_is(finished_talk, capsys):
    before = summary_of(finished_talk.out)["answers"]["before"]
    assert answers_of(capsys, finished_talk.model, *ASKED) == [before]
    plain = answers_of(capsys, finished_talk.model, *ASKED, "--template", "plain")
    assert plain != [before]


@pytest.mark.slow
def test_generate_a_file_in_batches_of_any_size(finished_talk, tmp_path, capsys):
    rows = finished_talk.rows()[:7]
    some = tmp_path / "some.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for size in (1, 3):
        output = tmp_path / f"{size}.jsonl"
        args = ["generate", str(finished_talk.out), "--data", str(some), "--max_tokens", "6"]
        args += ["--batch_size", str(size), "--output", str(output), "--temperature", "0.7"]
        assert main(args) == 0
        found[size] = [json.loads(line) for line in output.read_text().splitlines()]
    assert found[1] == found[3]
    assert [row["prompt"] for row in found[1]] == [row["instruction"] for row in rows]
    assert all(row["answer"].startswith("it is") for row in found[1])
    assert main(args) == 2
    assert "3.jsonl" in capsys.readouterr().err
    assert [json.loads(line) for line in output.read_text().splitlines()] == found[3]


# how a run is computed, and what it starts from


@pytest.mark.slow
def test_a_gguf_file_gives_the_run_of_its_directory(talk, run_of):
    path = tiny.write_gguf_of(talk.model, talk.directory / "tiny.gguf")
    out = talk.trained(*NO_PROMPT, "--train.steps", "10", "--model.path", str(path))
    wide = run_of("chat").straight
    assert column(out, "loss") == {step: column(wide, "loss")[step] for step in (5, 10)}
    assert column(out, "before/test/loss") == column(wide, "before/test/loss")


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_steps(talk, monkeypatch):
    compiled, at = [], {}

    def heard(event, *_, **__):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(heard)
    save = trainer.Trainer.save
    monkeypatch.setattr(
        trainer.Trainer,
        "save",
        lambda self, m: at.update({int(self.state.step): len(compiled)}) or save(self, m),
    )
    talk.trained(
        *NO_PROMPT, *SHORT, "--train.steps", "12", "--seed", "5"
    )  # a program that no other test has kept
    assert list(at) == [4, 8, 12]
    assert at[4] > 0
    assert at[12] == at[8]


def rejected(run, out, capsys, *args):
    """What a changed copy of a kind's run is rejected with."""
    return run.finished.rejected(capsys, *run.kind.flags, *args, "--output_dir", str(out))


@pytest.mark.slow
def test_a_damaged_start_is_named(run_of, tmp_path, capsys):
    out = shutil.copytree(run_of("pissa").straight, tmp_path / "out")
    start = out / "start/adapter.safetensors"
    start.write_bytes(start.read_bytes()[:-8])
    error = rejected(run_of("pissa"), out, capsys, "--train.select", "last")
    assert_mentions(error, start, "damaged")


@pytest.mark.slow
def test_adalora_needs_the_steps_that_it_began_with(run_of, tmp_path, capsys):
    out = shutil.copytree(run_of("adalora").straight, tmp_path / "out")
    assert_mentions(rejected(run_of("adalora"), out, capsys, "--train.steps", "14"), "steps", "12", "14")


FULL = ("--method", "full")


@pytest.mark.parametrize(
    ("tied", "args", "frozen"),
    [
        slow(True, FULL, False),
        slow(True, ("--lora.modules_to_save", "[lm_head]"), None),
        long(False, ("--lora.modules_to_save", "[lm_head]"), False),
        long(False, ("--lora.modules_to_save", "[embed_tokens]"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_head_and_embedding_may_be_trained(talk, capsys, monkeypatch, tied, args, frozen):
    tiny.write_model(talk.model, tie_word_embeddings=tied)
    found, head_is_frozen = [], language.head_is_frozen
    monkeypatch.setattr(
        language, "head_is_frozen", lambda parts: found.append(head_is_frozen(parts)) or found[-1]
    )
    if frozen is None:
        assert_mentions(talk.rejected(capsys, *ONE, *args), "lm_head")
        return
    talk.trained(*ONE, *args, "--train.steps", "10", "--train.select", "last")
    assert set(found) == {frozen}
    summary = summary_of(talk.out)
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.3
    again = evaluated(capsys, str(talk.out))
    assert again["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


# the page


TINY = flags("--data.max_length 64 --optimizer.warmup_steps 2 --train.epochs 1 --train.prompt_tokens 8")


@pytest.mark.slow
def test_the_commands_of_the_page_on_one_gpu_run(talk, tmp_path, monkeypatch):
    # The page's rank 16 needs keys of as many outputs.
    tiny.write_family(talk.model, "qwen3", tie_word_embeddings=True, num_key_value_heads=4)
    monkeypatch.chdir(tmp_path)
    talk.model.rename("Qwen3-0.6B")
    (config,) = blocks("one_gpu", "yaml")[""]
    (tmp_path / "chat.yaml").write_text(config)
    # The tiny model takes 64 tokens. A plan would compile for longer than all else takes; tests/plan has them.
    text = "".join(blocks("one_gpu", "bash")[""]).replace("--max_tokens 200", "--max_tokens 32")
    commands = re.findall(r"^loraplus (?!plan)(.*)", text, flags=re.M)
    for command in (shlex.split(line, comments=True) for line in commands):
        said(*command, *(TINY if command[1] == "chat.yaml" else ()))
    assert len(commands) == 7
    assert (tmp_path / "lora/adapter.gguf").exists()
    summary = summary_of(tmp_path / "runs/chat")
    assert summary["after"]["loss"] < summary["before"]["loss"]
    options = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (options["r"], options["base_model_name_or_path"]) == (16, "Qwen/Qwen3-0.6B")
    assert (tmp_path / "merged/config.json").exists()
