"""What README and pages show of the output of commands is what the commands print."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax.cli.commands import main

from .pages import DOCS, assert_printed, blocks

README = DOCS.parent / "README.md"
QUICKSTART = re.search(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)[1]
UNITS = {"s": 1, "min": 60, "h": 3600}


@pytest.mark.parametrize(
    "printed",
    [
        "loss 0.412 (2,000 texts)\nsteps: 4",
        "loss 0.4 (2,000 texts)\nother",
        "steps: 3\nloss 0.4 (2,000 texts)",
    ],
)
def test_an_output_unlike_the_page_s_is_seen(printed):
    shown = "loss 0.4 (2,000 texts)\n...\nsteps: 3"
    assert_printed(shown, "first\nloss 0.41  (2,010 texts)\nmore\nsteps: 3\nlast")
    with pytest.raises(AssertionError):
        assert_printed(shown, printed)


@pytest.mark.slow
def test_the_quickstart_prints_what_readme_shows_in_the_time_and_memory_that_it_estimates(tmp_path):
    """As users run it, without what the tests change; `LORAPLUS_PROGRAM` is that of another environment."""
    program = os.environ.get("LORAPLUS_PROGRAM") or shutil.which(
        "loraplus", path=str(Path(sys.executable).parent)
    )
    names = (
        "XLA_FLAGS",
        "JAX_PLATFORMS",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    )
    env = {name: value for name, value in os.environ.items() if name not in names}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [program, "train", "quickstart"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    print(run.stdout, f"CPU: {used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime:.0f} s")
    assert_printed(QUICKSTART, run.stdout)
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["after"]["accuracy"] == pytest.approx(0.8376, abs=0.01)
    parts = re.search(r"about ((?:\d+ (?:h|min|s) )+)and ([\d.]+) GB", run.stdout)
    estimated = sum(int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+) (\w+)", parts[1]))
    assert 0.5 < estimated / summary["seconds"] < 2
    assert 0.7 < float(parts[2]) * 1e6 / used.ru_maxrss < 1.4


def test_the_page_of_estimates_shows_the_quickstart_s():
    assert blocks("how_long", "text")[""][0] in QUICKSTART


def test_an_adapter_of_peft_is_inspected_as_the_page_shows(tmp_path, monkeypatch, capsys):
    shown = next(text for text in blocks("exporting", "text")[""] if "PEFT adapter" in text)
    directory = tmp_path / "their_adapter"
    directory.mkdir()
    options = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}
    base = re.search(r"^base +(.+)$", shown, flags=re.M)[1]
    options |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(options))
    modules = [f"layers.{n}.self_attn.{m}" for n in range(30) for m in ("q_proj", "v_proj")]
    factors = {}
    for module in modules:
        name = f"base_model.model.model.{module}"
        factors[f"{name}.lora_A.weight"] = np.zeros((16, 576), np.float32)
        factors[f"{name}.lora_B.weight"] = np.zeros((576 if "q_proj" in module else 192, 16), np.float32)
    save_file(factors, directory / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    main(["inspect", "their_adapter"])
    assert_printed(shown, capsys.readouterr().out)
