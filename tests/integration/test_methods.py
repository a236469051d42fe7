"""`sweep.methods` on the tiny world: equal budgets, resuming, a report whose first line answers."""

import signal
from itertools import product

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from loraplus_jax.cli.commands import main
from loraplus_jax.inference.tuned_model import describe, load
from loraplus_jax.sweep.report import WINNER
from loraplus_jax.sweep.run import Tuning
from loraplus_jax.tasks.held_out_generation import HeldOutTexts
from loraplus_jax.training.list_runs import find_runs
from loraplus_jax.training.place import look

from ..marks import slow
from ..messages import assert_mentions
from .runs import NO_PROMPT, Page, flags, report_of, summary_of

FLAGS = flags(
    "--sweep.learning_rates [2e-3,5e-3] --sweep.lr_ratios [4] --sweep.report_seeds 2 --sweep.rungs [0.5]"
    " --sweep.keep 0.5 --train.steps 8 --train.eval_every 4"
)
ONE_RATE = ("--sweep.learning_rates", "[5e-3]")
SOME = "[lora_plus,pissa,adalora,lora_rite,full]"
FEW = "[lora_rite,full]"


def compare(world, *flags, methods=SOME):
    command = ["sweep", str(world.config), "--output_dir", str(world.out), "--sweep.methods", methods]
    return main([*command, *FLAGS, *flags])


@pytest.mark.long
def test_texts_of_each_method_are_those_of_its_single_runs(talk, monkeypatch, capsys):
    talk.describe(beams=2, max_new_tokens=8, inputs=6, batch_size=4)
    flags = ("--mesh.data", "2", "--sweep.curve_points", "1")
    generate = HeldOutTexts.generate

    def stopped(*args):
        signal.raise_signal(signal.SIGTERM)
        generate(*args)
        pytest.fail("all texts were generated after a signal")

    with monkeypatch.context() as patch:
        patch.setattr(HeldOutTexts, "generate", stopped)
        assert compare(talk, *flags, methods="[lora_plus]") == 128 + signal.SIGTERM
    assert_mentions(capsys.readouterr().err, "stopped at step 8 of the report", "resume")
    assert compare(talk, *flags, methods="[lora_plus]") == 0
    assert_mentions(
        capsys.readouterr().out, "seed 1: generating texts for 6 test inputs", "seed 2: generating"
    )
    report = report_of(talk.out)
    own = {name: [run for run in report["runs"] if run["arm"] == name] for name in report["methods"]}
    seed, chosen = own["lora_plus"][0]["seed"], report["chosen"]["lora_plus"]
    args = ("--seed", seed, "--lora.lr_ratio", chosen["lr_ratio"])
    args += ("--optimizer.learning_rate", chosen["learning_rate"], "--train.steps", 8)
    single = summary_of(talk.trained(*map(str, args), out=talk.directory / "single"))["after"]
    assert own["lora_plus"][0]["text_scores"] == {
        n: pytest.approx(single[n]) for n in ("bleu", "chrf", "rouge_l", "nist")
    }
    for name, score in report["methods"]["lora_plus"]["text_scores"].items():
        pairs = zip(own["lora_plus"], own["lora"], strict=True)
        gains = [a["text_scores"][name] - b["text_scores"][name] for a, b in pairs]
        assert score["gain"]["mean"] == pytest.approx(sum(gains) / 2)


@pytest.mark.slow
def test_what_a_method_forgets_is_the_change_of_the_loss_by_hand(talk, capsys):
    """On plain texts, whatever the task: here questions, of which only the choices count."""
    talk.change_config(task="multiple_choice")
    talk.change_config("data", path=str(talk.directory / "questions.jsonl"))
    texts = ["the snow is white", "grass is green and the sky is blue", "the sun is yellow " * 9]
    file = talk.write_rows("texts.jsonl", [{"text": text} for text in texts])
    flags = (*NO_PROMPT, *ONE_RATE, "--sweep.curve_points", "1", "--sweep.unrelated_text", str(file))
    methods = "[pissa]"
    assert compare(talk, *flags, methods=methods) == 0
    assert "1 of 3 texts truncated to data.max_length 32" in capsys.readouterr().out
    report, seeds = report_of(talk.out), (1, 2)
    losses = {
        name: [
            run["unrelated"] for run in report["runs"] if (run["arm"], run["seed"]) in product([name], seeds)
        ]
        for name in report["methods"]
    }
    assert [len(rows) for rows in losses.values()] == [2, 2]
    first, chosen = losses["lora"][0], report["chosen"]["lora"]
    args = ("--seed", seeds[0], "--lora.lr_ratio", chosen["lr_ratio"], "--train.steps", 8)
    args += ("--optimizer.learning_rate", chosen["learning_rate"])
    out = talk.trained(*NO_PROMPT, *map(str, args), out=talk.directory / "single")
    tuned = load(describe(look(out)))
    tokenizer = Tokenizer.from_file(str(talk.model / "tokenizer.json"))

    apply = jax.jit(tuned.parts.model.apply)

    def loss(variables):
        parts = []
        for ids in (tokenizer.encode(text).ids[:32] for text in texts):
            padded, mask = np.zeros((2, 1, 32), np.int32)
            padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
            logits = np.asarray(apply(variables, padded, mask)[0], np.float64)[: len(ids) - 1]
            at_next = logits[np.arange(len(ids) - 1), ids[1:]]
            parts += (np.log(np.exp(logits).sum(-1)) - at_next).tolist()
        return np.mean(parts)

    after = loss(tuned.variables)
    base = loss(tuned.variables | {"lora": jax.tree.map(np.zeros_like, tuned.variables["lora"])})
    assert first["after"] == pytest.approx(after, rel=1e-5)
    assert abs(after - base) > 0.01
    assert all(row["before"] == pytest.approx(base, rel=1e-5) for rows in losses.values() for row in rows)
    for name, rows in losses.items():
        found = report["methods"][name]["unrelated"]
        assert found["perplexity_before"] == pytest.approx(np.exp(base), rel=1e-4)
        assert found["perplexity_after"] == pytest.approx(np.exp(np.mean([row["after"] for row in rows])))
        assert found["change"]["mean"] == pytest.approx(
            np.mean([row["after"] - row["before"] for row in rows])
        )
        pairs = [own["after"] - its["after"] for own, its in zip(rows, losses["lora"], strict=True)]
        assert found["against_lora"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert_mentions((talk.out / "report.html").read_text(), "texts.jsonl", "change of the loss")
    # What is read back must be of the same texts.
    talk.write_rows("texts.jsonl", [{"text": "the sky is green"}])
    (talk.out / "summary.json").unlink()
    assert compare(talk, *flags, methods=methods) == 2
    assert_mentions(capsys.readouterr().err, "data.unrelated", "--allow_different data")
    talk.write_rows("texts.jsonl", [{"txt": "the sky is green"}])
    assert compare(talk, *flags, methods=methods) == 2
    assert_mentions(capsys.readouterr().err, "sweep.unrelated_text", "texts.jsonl", "text")
    talk.write_rows("texts.jsonl", [{"text": "the sky is green"}])
    assert compare(talk, *flags, "--allow_different", "data.unrelated", methods=methods) == 0
    (line,) = report_of(talk.out)["protocol"]["allowed_differences"]
    assert_mentions(line, "data.unrelated")
    assert summary_of(talk.out)["allowed_differences"] == [line]
    assert line in Page((talk.out / "report.html").read_text()).text


@pytest.mark.slow
def test_methods_are_tuned_alike_and_resumed(world, capsys, monkeypatch):
    begin = Tuning.open

    def interrupted(self, *args):
        if self.name == "full":
            raise KeyboardInterrupt
        return begin(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tuning, "open", interrupted)
        assert compare(world, methods=FEW) == 130
    before = {p: p.stat().st_mtime_ns for p in world.out.glob("units/*/result.json")}
    # Settings are compared also where someone edited those of the directory.
    config = world.out / "config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("  steps: 8\n", "  steps: 12\n"))
    capsys.readouterr()
    assert compare(world, "--train.steps", "12", methods=FEW) == 2
    assert_mentions(capsys.readouterr().err, world.out, "settings.train.steps", 8, 12, "--fresh")
    config.write_text(settings)
    # What has finished is read back, without a program being compiled.
    opened = []

    def noted(self, *args):
        opened.append(self.name)
        return begin(self, *args)

    monkeypatch.setattr(Tuning, "open", noted)
    assert compare(world, "--allow_different", "data", methods=FEW) == 0
    assert {*opened} == {"full"}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # One of two settings is left at the rung.
    names = [f"{name}-{stage}-0" for name in ("lora", "lora_rite") for stage in ("search-4", "report")]
    assert sorted(path.parent.name for path in before) == sorted(names)
    report = report_of(world.out)
    assert list(report["methods"]) == ["lora", "lora_rite", "full"]
    assert report["protocol"]["settings"] == {"lora": 2, "lora_rite": 2, "full": 2}
    full, lora = (report["methods"][name] for name in ("full", "lora"))
    assert full["cost"]["trainable"] > 5 * lora["cost"]["trainable"] > 0
    assert lora["cost"]["step_seconds"] > 0
    assert report["protocol"]["confidence"] == pytest.approx(1 - 0.05 / 2)
    losses = {
        name: {run["seed"]: run["test"]["loss"] for run in report["runs"] if run["arm"] == name}
        for name in report["methods"]
    }
    for name, method in report["methods"].items():
        assert method["loss"] == pytest.approx(sum(losses[name].values()) / 2)
    for row in report["comparisons"]:
        paired = [loss - losses["lora"][seed] for seed, loss in losses[row["first"]].items()]
        assert row["test_loss"]["mean"] == pytest.approx(sum(paired) / 2)
    out = capsys.readouterr().out
    assert report["verdict"] in out
    page = Page((world.out / "report.html").read_text())
    assert report["verdict"] in page.text
    page.check(report)
    assert {f"protocol.untrained.{name}" for name in ("loss", "accuracy")} <= {
        path for path, *_ in page.numbers
    }
    # The config of a method's chosen setting trains the run that was compared.
    assert f"lora/{WINNER}" in out
    seed = report["protocol"]["report_seeds"][0]
    args = ("--seed", str(seed), "--train.select", "last")
    assert main(["train", str(world.out / "lora_rite" / WINNER), *args]) == 0
    loss = summary_of(world.out / "lora_rite/winner")["after"]["loss"]
    assert loss == pytest.approx(losses["lora_rite"][seed], rel=1e-4)
    assert {*find_runs(world.out)} == {world.out, world.out / "lora_rite/winner"}


@pytest.mark.parametrize(
    ("methods", "args", "words"),
    [
        ("[lora_pluss]", "", ("sweep.methods", "lora_pluss")),
        (SOME, "--sweep.ranks [2,4]", ("ranks", "null", "methods")),
        (SOME, "--sweep.method_learning_rates '{olora: [1e-3,2e-3]}'", ("method_learning_rates", "olora")),
        (SOME, "--sweep.method_learning_rates '{pissa: [1e-3]}'", ("sweep.methods pissa", "2", "1")),
        (SOME, "--model.quantize nf4", ("sweep.methods pissa", "model.quantize", "nf4")),
        (SOME, "--train.theory_every 3", ("sweep.methods full", "train.theory_every", "lora_plus")),
        (SOME, "--optimizer.name riemannian", ("sweep.methods adalora", "optimizer.name", "adamw")),
        (SOME, "--data.path missing.csv", ("missing.csv",)),
        slow(SOME, "--lora.rank 14", ("sweep.methods adalora", "lora.rank", "21")),
        (SOME, "--allow_different data", ("--allow_different", "no effect")),
    ],
)
def test_bad_input(world, capsys, methods, args, words):
    assert compare(world, *flags(args), methods=methods) == 2
    printed = capsys.readouterr().err
    assert_mentions(printed, *words)
    assert printed.count("\n") == 1
    assert not world.out.exists()
