"""Whole runs with a tiny language model: training, evaluation and generation by the command line."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.cli.commands import main
from loraplus_jax.tasks import causal_lm as language
from loraplus_jax.training import trainer

from ..marks import long
from ..messages import assert_mentions
from . import language_world as tiny
from .runs import (
    ASKED,
    NO_PROMPT,
    PROMPT,
    SHORT,
    SHORT_TALK,
    assert_resumes,
    column,
    evaluated,
    flags,
    interrupted,
    printed,
    rows_of,
    summary_of,
    tensor_bytes,
    tensors_of,
    undisturbed,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

ONE = (*NO_PROMPT, "--train.steps", "3", "--train.log_every", "1")


@pytest.fixture(scope="module")
def short(first_talk, tmp_path_factory, cache):
    """A short run that others are compared with."""
    return undisturbed(first_talk, tmp_path_factory, SHORT_TALK)


def answers_of(capsys, *args):
    """What `loraplus generate` prints, the answers alone."""
    text = printed(capsys, "generate", *args)
    assert text.endswith("\n\n")
    return [block.partition("\n")[2] for block in text[:-2].split("\n\n")]


# what a run leaves


def test_a_run_learns_and_leaves_its_numbers_and_answers(finished_talk):
    summary, out = summary_of(finished_talk.out), finished_talk.out
    before, after = summary["before"], summary["after"]
    assert after["loss"] < 1 < 5 < before["loss"]
    assert set(before) == set(after) == {"loss", "perplexity"}
    for values in (before, after):
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-6)
    assert summary["held_out"] == {"split": "test", "examples": 24}
    answers = summary["answers"]
    assert answers["prompt"] == PROMPT
    assert answers["after"] == "it is white"
    assert answers["before"] != answers["after"]
    text = finished_talk.printed.read_text()
    for when in ("before: ", "after:  "):
        assert f"> {PROMPT}\n{when}{answers[when.strip(': ')]}" in text
    assert "data: 84 train, 12 validation, 24 test" in text.splitlines()
    assert list(column(out, "loss")) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert list(column(out, "validation/perplexity")) == [20, 40]
    for name, when in (("before/test/perplexity", "before"), ("test/perplexity", "after")):
        assert [*column(out, name).values()] == [summary[when]["perplexity"]]
    # Every product of the layers at rank 4: q, k, v, o, gate, up, down; in all also the base.
    assert summary["trainable"] == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    base = sum(tensor.size for tensor in load_file(finished_talk.model / "model.safetensors").values())
    assert summary["total"] == summary["trainable"] + base


def test_eval_repeats_the_summary(finished_talk, capsys):
    found = evaluated(capsys, str(finished_talk.out))
    assert (found.pop("data"), found.pop("examples")) == ("test", 24)
    assert found == pytest.approx(summary_of(finished_talk.out)["after"], rel=1e-5)


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


def test_generate_repeats_the_answer_of_the_run(finished_talk, capsys):
    assert answers_of(capsys, finished_talk.out, *ASKED) == [
        summary_of(finished_talk.out)["answers"]["after"]
    ]


def test_generate_with_a_model_as_it_is(finished_talk, capsys):
    before = summary_of(finished_talk.out)["answers"]["before"]
    assert answers_of(capsys, finished_talk.model, *ASKED) == [before]
    plain = answers_of(capsys, finished_talk.model, *ASKED, "--template", "plain")
    assert plain != [before]


def test_generate_a_file_in_batches_of_any_size(finished_talk, tmp_path, capsys):
    rows = finished_talk.rows()[:7]
    some = tmp_path / "some.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for size in (1, 3, 7):
        output = tmp_path / f"{size}.jsonl"
        args = ["generate", str(finished_talk.out), "--data", str(some), "--max_tokens", "6"]
        args += ["--batch_size", str(size), "--output", str(output), "--temperature", "0.7"]
        assert main(args) == 0
        found[size] = [json.loads(line) for line in output.read_text().splitlines()]
    assert found[1] == found[3] == found[7]
    assert [row["prompt"] for row in found[1]] == [row["instruction"] for row in rows]
    assert all(row["answer"].startswith("it is") for row in found[1])
    assert main(args) == 2
    assert "7.jsonl" in capsys.readouterr().err
    assert [json.loads(line) for line in output.read_text().splitlines()] == found[7]


@pytest.mark.long
def test_generate_draws_by_the_seed_and_heeds_the_system(finished_talk, capsys):
    prompts = [word for n in range(4) for word in ("--prompt", f"{PROMPT} {n}")]
    args = (finished_talk.model, *prompts, "--max_tokens", 12, "--temperature", 1.5)
    first = answers_of(capsys, *args, "--seed", 1)
    assert answers_of(capsys, *args, "--seed", 1) == first
    assert answers_of(capsys, *args, "--seed", 2) != first
    narrow = answers_of(capsys, *args, "--seed", 1, "--top_p", 1e-6)
    greedy = answers_of(capsys, finished_talk.model, *prompts, "--max_tokens", 12)
    assert narrow == greedy != first
    more = ("--max_tokens", 12, "--system", "just say green now")
    assert answers_of(capsys, finished_talk.model, *prompts, *more) != greedy


# stop and resume

NOISY = (
    *NO_PROMPT,
    *flags("--data.packing true --data.max_length 64 --lora.dropout 0.1 --train.accumulate 2"),
    *flags("--train.batch_size 8 --train.eval_batch_size 8 --train.steps 20 --train.eval_every 8"),
    *flags("--train.log_every 4 --optimizer.schedule linear --optimizer.weight_decay 0.01"),
)


@pytest.mark.long
def test_an_interrupted_run_resumes_and_ends_bit_identical(talk, capsys):
    straight = talk.trained(*NOISY, out=talk.directory / "straight")
    assert_resumes(talk, straight, *NOISY, step=13)
    assert_mentions(capsys.readouterr().out, "step 8 of 20", "packed")


@pytest.mark.long
def test_a_resumed_run_has_both_answers(talk):
    straight = talk.trained(*SHORT, out=talk.directory / "straight")
    interrupted(talk, 6, *SHORT)
    assert summary_of(talk.trained(*SHORT))["answers"] == summary_of(straight)["answers"]


# the same numbers, however they are computed


@pytest.mark.long
def test_lora_is_bitwise_lora_plus_with_ratio_1(talk, short):
    lora = talk.trained(*SHORT_TALK, "--method", "lora", out=talk.directory / "lora")
    plus = talk.trained(*SHORT_TALK, "--lora.lr_ratio", "1", out=talk.directory / "plus")
    assert tensor_bytes(lora) == tensor_bytes(plus) != tensor_bytes(short)
    assert rows_of(lora) == rows_of(plus)


def assert_same(out, expected):
    """A run with the adapters, losses and metrics of another one, but for rounding."""
    assert tensors_of(out).keys() == tensors_of(expected).keys()
    for name, tensor in tensors_of(expected).items():
        np.testing.assert_allclose(tensors_of(out)[name], tensor, rtol=0, atol=1e-5, err_msg=name)
    for name in ("loss", "validation/loss", "test/loss"):
        assert column(out, name) == pytest.approx(column(expected, name), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "args",
    [
        *("--mesh.data 8", "--mesh.data 8 --train.accumulate 2", "--model.unroll true"),
        *("--model.remat dots", "--model.remat full", "--model.attention xla", "--model.attention blocked"),
        *("--model.loss_chunk 7", "--model.loss_chunk 1"),
    ],
)
def test_the_same_run_computed_otherwise(talk, short, args):
    assert_same(talk.trained(*SHORT_TALK, *flags(args)), short)


@pytest.mark.long
def test_with_the_logits_it_is_the_same_run(talk, short, monkeypatch):
    monkeypatch.setattr(language, "head_is_frozen", lambda parts: False)
    assert_same(talk.trained(*SHORT_TALK), short)


def test_a_gguf_file_gives_the_run_of_its_directory(talk, short):
    path = tiny.write_gguf_of(talk.model, talk.directory / "tiny.gguf")
    out = talk.trained(*SHORT_TALK, "--model.path", str(path))
    assert tensor_bytes(out) == tensor_bytes(short)
    assert rows_of(out) == rows_of(short)


def test_packed_and_unpacked_evaluations_are_equal(talk):
    args = (*ONE, "--data.max_length", "64")
    whole = talk.trained(*args, out=talk.directory / "whole")
    packed = talk.trained(*args, "--data.packing", "true")
    one, other = summary_of(whole), summary_of(packed)
    assert other["before"] == pytest.approx(one["before"], rel=1e-5)
    assert other["held_out"] == one["held_out"]
    assert tensor_bytes(whole) != tensor_bytes(packed)  # other batches


@pytest.mark.long
def test_bf16_runs_near_float32_with_float32_adapters(talk, short):
    out = talk.trained(*SHORT_TALK, "--model.dtype", "bfloat16", "--model.param_dtype", "bfloat16")
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {np.dtype("float32")}
    before, after = summary_of(out)["before"]["loss"], summary_of(out)["after"]["loss"]
    assert before == pytest.approx(summary_of(short)["before"]["loss"], abs=0.05)
    assert before != summary_of(short)["before"]["loss"]
    assert after < before - 1


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


# which parts are trained


@pytest.mark.parametrize("tied", [True, long(False)], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("args", "frozen"),
    [
        (("--method", "full"), (False, False)),
        long(("--lora.modules_to_save", "[lm_head]"), (None, False)),
        long(("--lora.modules_to_save", "[embed_tokens]"), (False, True)),
        (("--lora.target_modules", "[q_proj,embed_tokens]"), (False, True)),
        long(("--lora.target_modules", "[q_proj,lm_head]"), (None, False)),
        long(("--lora.target_modules", "[q_proj]", "--lora.modules_to_save", "[norm]"), (True, True)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_head_and_embedding_may_be_trained(talk, capsys, monkeypatch, tied, args, frozen):
    tiny.write_model(talk.model, tie_word_embeddings=tied)
    found, head_is_frozen = [], language.head_is_frozen
    monkeypatch.setattr(
        language, "head_is_frozen", lambda parts: found.append(head_is_frozen(parts)) or found[-1]
    )
    code = talk.train(*ONE, *args, "--train.steps", "10", "--train.select", "last")
    if frozen[not tied] is None:
        assert code == 2
        assert "'lm_head'" in capsys.readouterr().err
        return
    assert code == 0
    assert set(found) == {frozen[not tied]}
    summary = summary_of(talk.out)
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.3
    again = evaluated(capsys, str(talk.out))
    assert again["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
