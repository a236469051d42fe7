"""`loraplus export`, and what runs on its results, without PyTorch; tests/reference compares with PEFT itself."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.inference.verify_conversion import gguf_changes

from ..messages import assert_mentions
from .runs import evaluated, flags, printed, rejected

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]


@pytest.fixture
def exported(run_of):
    """The run of `finished` as an adapter of PEFT with our notes, never changed."""
    return run_of("bert").export("peft")


def without_notes(exported, to):
    """A copy as PEFT itself would have written it."""
    ours = ("loraplus.json", "loraplus.safetensors", "README.md")
    return shutil.copytree(exported, to, ignore=lambda *_: ours)


def test_an_export_names_its_base(run_of, tmp_path, capsys):
    run, name = run_of("chat"), "someone/tiny-llama"
    config = json.loads((run.export("peft") / "adapter_config.json").read_text())
    base = str(run.finished.model)
    assert (config["task_type"], config["base_model_name_or_path"], config["r"]) == ("CAUSAL_LM", base, 4)
    printed(capsys, "export", run.straight, "--to", tmp_path / "named", "--base_model", name)
    config = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert f"'{name}'" in (tmp_path / "named/README.md").read_text()


def test_a_language_model_exported_for_llama_cpp_has_pefts_factors(run_of, tmp_path, capsys):
    run = run_of("chat")
    flags = ("--format", "gguf", "--dtype", "float32")
    told = printed(capsys, "export", run.straight, "--to", tmp_path / "gguf", *flags)
    options = json.loads((run.export("peft") / "adapter_config.json").read_text())
    factors = load_file(run.export("peft") / "adapter_model.safetensors")
    assert_mentions(told, tmp_path / "gguf/adapter.gguf", len(factors) // 2, "llama", options["lora_alpha"])
    files = {path.name for path in (tmp_path / "gguf").iterdir()}
    assert files == {"adapter.gguf", "README.md", "loraplus.json"}
    assert "--lora adapter.gguf" in (tmp_path / "gguf/README.md").read_text()
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    config = json.loads((run.world.model / "config.json").read_text())
    found = dict(gguf_changes(tmp_path / "gguf/adapter.gguf", config, modules))
    assert found.keys() == modules
    for name, change in found.items():
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(change, options["lora_alpha"] / options["r"] * b @ a, rtol=1e-6)


def test_adapters_of_peft_are_used_with_their_base_or_a_config(run_of, tmp_path, capsys):
    run = run_of("chat")
    peft = without_notes(run.export("peft"), tmp_path / "peft")
    assert run.answer(peft) == run.answer()
    assert "--config" in rejected(capsys, "eval", peft)
    assert evaluated(capsys, peft, "--config", run.finished.config) == run.exact


LAYERS = "--lora.target_modules '[encoder/layers/attention/query, "


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--lora.rank 2", ("lora.rank", 4, 2)),
        ("--lora.alpha 8", ("lora.alpha", 16.0, 8.0)),
        ("--lora.use_rslora true", ("lora.use_rslora", False)),
        ("--lora.target_modules [query]", (LAYERS,)),
        ("--method full", ("method", "full", "adapters")),
        ("--lora.lr_ratio 8", ("lora.lr_ratio", 4.0, 8.0, "--init_adapter_rates new")),
        ("--task regression --data.label rating", ("task",)),
    ],
)
def test_disagreement_with_the_settings_is_named_with_both_values(finished, tmp_path, capsys, args, words):
    args = ("--init_adapter", str(finished.out), *flags(args), "--output_dir", str(tmp_path / "new"))
    error = finished.rejected(capsys, *args)
    assert all(str(word) in error for word in words), error
    assert not (tmp_path / "new").exists()


def test_another_base_is_rejected(finished, exported, tmp_path, capsys):
    world = finished.copy(tmp_path / "copy")
    world.change_tensors(lambda tensors: tensors["encoder.layer.0.output.dense.weight"].__iadd__(1))
    assert "base.weights" in rejected(capsys, "export", world.out, "--to", tmp_path / "to", "--merged")
    assert not (tmp_path / "to").exists()
    notes = shutil.copytree(exported, tmp_path / "peft") / "loraplus.json"
    notes.write_text(notes.read_text().replace(str(finished.directory), str(world.directory)))
    assert "base.weights" in rejected(capsys, "eval", tmp_path / "peft")


def test_a_pickle_is_never_read(finished, exported, tmp_path, capsys):
    path = without_notes(exported, tmp_path / "peft") / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    error = finished.rejected(capsys, "--init_adapter", str(path.parent), "--output_dir", "new")
    assert_mentions(error, "adapter_model.bin", "pickle")
