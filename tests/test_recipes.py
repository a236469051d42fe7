"""Every recipe in configs/ can be read, says how it is run, and gives a figure or says that it was not run."""

import re
from pathlib import Path

import pytest

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.recipes import find_config
from loraplus_jax.settings.schema import Settings
from loraplus_jax.sweep.settings import SweepRun

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe(path):
    command, kind = ("sweep", SweepRun) if path.stem.endswith("_sweep") else ("train", Settings)
    settings = parse_settings(path, (), kind)
    assert settings.output_dir == f"runs/{path.stem}"
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"loraplus {command} {path.stem}" in head
    assert path.read_text().splitlines()[0].endswith(".")  # what `loraplus recipes` prints
    assert bool(re.search(r"Measured\b.*\d", head, re.DOTALL)) != ("Not run here" in head)


def test_a_word_is_a_recipe_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert find_config("quickstart") in CONFIGS
    assert len(CONFIGS) > 5
    for absent in ("quickstart.yaml", "./quickstart.yml", "elsewhere/quickstart"):
        with pytest.raises(ValueError, match=f"not found: {Path(absent)}"):
            find_config(absent)
    Path("quickstart").rmdir()
    Path("quickstart").write_text("seed: 1")
    assert find_config("quickstart") == Path("quickstart")
