"""Runs of AdaLoRA: the ranks reach the target, are reported, and are what PEFT gets."""

import json

import numpy as np
import pytest

from loraplus_jax.interop.adapter_directory import load_adapter

from ..messages import assert_mentions
from .runs import NO_PROMPT, evaluated, flags, interrupted, printed, result_of, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

ADALORA = flags(
    "--train.steps 12 --train.eval_every 6 --train.select last --lora.rank 6 --optimizer.target_rank 2"
    " --optimizer.learning_rate 1e-2"
)


def test_a_run_lowers_its_ranks_resumes_and_exports(talk, tmp_path, capsys):
    args = (*NO_PROMPT, *ADALORA)
    straight = talk.trained(*args, out=tmp_path / "straight")
    summary = summary_of(straight)
    ranks = {module: np.ravel(value) for module, value in summary["ranks"].items()}
    assert sum(map(sum, ranks.values())) == 2 * sum(map(len, ranks.values()))
    assert len({int(rank) for values in ranks.values() for rank in values}) > 1
    lora = load_adapter(straight / "adapter").lora["layers"]["self_attn"]
    for name, pair in lora.items():
        counts = (np.asarray(pair["lora_b"]) != 0).any(-1).sum(-1)
        assert counts.tolist() == ranks[f"layers/self_attn/{name}"].tolist()
    interrupted(talk, 7, *args)
    assert_mentions(talk.rejected(capsys, *args, "--train.steps", "14"), "steps", "12", "14")
    assert talk.train(*args) == 0
    assert result_of(talk.out) == result_of(straight)
    printed(capsys, "export", talk.out, "--to", tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    written = {max(1, rank) for rank in config["rank_pattern"].values()}
    assert written | {config["r"]} >= {max(1, int(r)) for values in ranks.values() for r in values}
    loss = evaluated(capsys, tmp_path / "peft")["loss"]
    assert loss == pytest.approx(summary["after"]["loss"], rel=1e-5)
