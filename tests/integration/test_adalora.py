"""Runs of AdaLoRA: the ranks reach the target, are reported, and are what PEFT gets."""

import json

import numpy as np
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.interop.adapter_files import load_adapter

from ..messages import assert_mentions
from .test_run import interrupt_at, printed_json, summary_of, tensor_bytes

pytestmark = pytest.mark.usefixtures("cache")

ADALORA = (
    *(
        "--train.prompt",
        "null",
        "--train.prompt_tokens",
        "64",
        "--train.steps",
        "12",
        "--train.eval_every",
        "6",
    ),
    *(
        "--train.select",
        "last",
        "--lora.rank",
        "6",
        "--optimizer.target_rank",
        "2",
    ),
    *("--optimizer.learning_rate", "1e-2"),
)


@pytest.mark.slow
def test_a_run_lowers_its_ranks_resumes_and_exports(talk, tmp_path, capsys):
    straight = talk.trained(*ADALORA, out=tmp_path / "straight")
    summary = summary_of(straight)
    ranks = {module: np.ravel(value) for module, value in summary["ranks"].items()}
    assert sum(map(sum, ranks.values())) == 2 * sum(map(len, ranks.values()))
    assert len({int(rank) for values in ranks.values() for rank in values}) > 1
    lora = load_adapter(straight / "adapter").lora["layers"]["self_attn"]
    for name, pair in lora.items():
        counts = (np.asarray(pair["lora_b"]) != 0).any(-1).sum(-1)
        assert counts.tolist() == ranks[f"layers/self_attn/{name}"].tolist()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        assert talk.train(*ADALORA) == 130
    capsys.readouterr()
    flags = list(ADALORA)
    flags[flags.index("12")] = "14"
    assert talk.train(*flags) == 2
    assert_mentions(capsys.readouterr().err, "steps", "12", "14")
    assert talk.train(*ADALORA) == 0
    assert tensor_bytes(talk.out) == tensor_bytes(straight)
    assert main(["export", str(talk.out), "--to", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    written = {name: max(1, rank) for name, rank in config["rank_pattern"].items()}
    assert set(written.values()) | {config["r"]} >= {
        max(1, int(r)) for values in ranks.values() for r in values
    }
    capsys.readouterr()
    found = printed_json(capsys, "eval", str(tmp_path / "peft"))
    assert found["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--optimizer.target_rank", "2"), ("optimizer.target_rank", "train.select", "last")),
        (
            (*ADALORA[:-2], "--optimizer.name", "riemannian"),
            ("optimizer.target_rank", "optimizer.name", "adamw"),
        ),
        (
            ("--train.select", "last", "--lora.rank", "4", "--optimizer.target_rank", "5"),
            ("optimizer.target_rank", "4", "5"),
        ),
    ],
)
def test_bad_settings(talk, capsys, flags, words):
    assert talk.train(*flags) == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not talk.out.exists()
