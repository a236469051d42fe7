"""What README and pages show of the output of commands is what the commands print."""

import dataclasses
import json
import math
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
from loraplus_jax.inference.eval_tasks import Accuracy, TaskResults
from loraplus_jax.plan import fits
from loraplus_jax.plan.devices import GPUS
from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.plan import Work, roofline
from loraplus_jax.plan.render import format_fits, format_plan
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.settings import SweepRun

from .pages import DOCS, assert_printed, blocks
from .plan.tiny import llama, plan_by_hand
from .training.test_list_runs import run_of, sweep_rows

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
    assert summary["after"]["accuracy"] == pytest.approx(0.8367, abs=0.01)
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


def test_runs_are_listed_as_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {"model": {"path": "minilm"}, "data": {"path": "d"}}
    (tmp_path / "runs/copied/checkpoints").mkdir(parents=True)
    after = {"after": {"accuracy": 0.8367}, "held_out": {"split": "test"}, "steps": 300, "selected_step": 300}
    after["constant"] = {"accuracy": 0.4990}
    run_of(Path("runs/quickstart"), model | {"train": {"steps": 300}}, steps=[300], summary=after)
    rows = sweep_rows({"lora": [math.nan]}, 6, "search")
    run_of(Path("runs/quickstart_sweep"), model | {"train": {"steps": 300}}, SweepRun, rows=rows)
    rows = [{"step": 20, "validation/accuracy": 0.7188, "validation/loss": 0.5}]
    run_of(Path("runs/short"), model | {"train": {"steps": 30}}, steps=[20], rows=rows)
    assert main(["runs"]) == 0
    (shown,) = (text for text in blocks("runs", "text")[""] if "finished" in text)
    assert_printed(shown, capsys.readouterr().out)


def shown_by_plan(words):
    (shown,) = (text for text in blocks("plan", "text")[""] if words in text)
    return shown


def test_the_gpus_of_the_page_follow_from_the_memory_that_it_shows(monkeypatch):
    """Of a step on one and on eight GPUs; on two and on four by what is left of the smallest card."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.chdir(DOCS.parent)
    gigabytes = {"none": (21.135, 13.756, 7.826, 5.176), "nf4": (10.466, 6.166, 4.036, 3.276)}

    def needed(settings, gpu, count, say):
        return int(1e9 * gigabytes[settings.model.quantize][fits.COUNTS.index(count)]), None

    monkeypatch.setattr(fits, "_bytes_needed", needed)
    settings = parse_settings("benchmarks/plan/llama31_8b.yaml")
    printed = format_fits(fits.find_fits(settings, print), settings)
    assert_printed(shown_by_plan("which GPUs"), printed, rel=0.002)


def test_a_plan_reads_as_the_page_shows(tmp_path, monkeypatch):
    """Its labels, units, shares and times follow from the figures that the page gives."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    chip, work = GPUS["h100"], Work(351_783.46e9, 711.01e9)
    gathers = Collective("all-gather", 25_580_000_000 // 7, 8, 8, "bf16[1]", "")
    sizes = {"rows": 32, "tokens": 2048, "layers": 32, "trained": 41_943_040, "total": 8_072_204_288}
    memory = {"frozen weights": 2_010_000_000, "trained": 116_390_000, "optimizer": 232_780_000}
    sizes |= {"needed": 7_500_000_000, "peak": 7_330_000_000, "evaluation": 4_220_000_000}
    place = {"device": "NVIDIA H100 80GB HBM3", "chip": chip, "room": chip.available, "work": work}
    place |= {"mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "memory": memory | {"temporaries": 5_000_000_000}}
    times = {"collectives": (gathers,), "roofline": roofline(chip, work, [gathers])}
    plan = plan_by_hand("benchmarks/plan/llama31_8b", **sizes, **place, **times)
    assert_printed(
        shown_by_plan("NVIDIA H100"), format_plan(plan, llama(tmp_path, model={"param_dtype": "bfloat16"}))
    )


def test_accuracies_read_as_the_page_shows():
    right = {"boolq": 33, "piqa": 51} | {f"task {n}": 28 for n in range(5)}
    tasks = {name: Accuracy.of([True] * n + [False] * (100 - n), 100) for name, n in right.items()}
    tasks["piqa"] = dataclasses.replace(tasks["piqa"], available=9923)
    (shown,) = blocks("evaluate_tasks", "text")[""]
    assert_printed(shown, str(TaskResults("m", "data", None, None, 100, tasks)), rel=0.06)
