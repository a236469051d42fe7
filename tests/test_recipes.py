"""Every recipe in configs/ can be read, says how it is run, and gives a figure or says that it was not run."""

import re
from pathlib import Path

import pytest

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings
from loraplus_jax.sweep.settings import SweepRun

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe(path):
    command, kind = ("sweep", SweepRun) if path.stem.endswith("_sweep") else ("train", Settings)
    settings = parse_settings(path, (), kind)
    assert settings.output_dir == f"runs/{path.stem}"
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"loraplus {command} configs/{path.name}" in head
    assert bool(re.search(r"Measured\b.*\d", head, re.DOTALL)) != ("Not run here" in head)


def test_the_recipes_are_seen():
    assert {
        "quickstart",
        "quickstart_sweep",
        "smollm2_chat",
        "llama_alpaca",
        "llama_commonsense",
        "roberta_glue",
    } <= {p.stem for p in CONFIGS}
