"""What is at a path is decided by its small files alone, and what a command cannot use says what it is."""

import json

import pytest

from loraplus_jax.step.run_metadata import describe_run
from loraplus_jax.training.place import ADAPTERS, look

from ..refusals import refusals

NOTES = describe_run({}, None)
RUN = NOTES | {"settings": {}, "task": {}}
OURS = {"adapter.json": NOTES, "adapter.safetensors": {}}
PEFT = {"adapter_config.json": {}}


@pytest.mark.parametrize(
    ("files", "kind", "is_peft"),
    [
        (OURS | {"adapter.json": RUN}, "run", False),
        (OURS, "loop", False),
        (PEFT | {"loraplus.json": RUN}, "run", True),
        (PEFT | {"loraplus.json": NOTES}, "peft", True),
        (PEFT, "peft", True),
    ],
)
def test_an_adapter_is_found_in_a_run_and_in_its_own_directory(tmp_path, files, kind, is_peft):
    adapter = tmp_path / "run/adapter"
    adapter.mkdir(parents=True)
    assert look(tmp_path / "run").kind == "base"
    for name, content in files.items():
        (adapter / name).write_text(json.dumps(content))
    for path in (tmp_path / "run", adapter):
        place = look(path).require(*ADAPTERS)
        assert (place.kind, place.directory, place.is_peft) == (kind, adapter, is_peft)


def required(kinds, **files):
    def require(tmp_path):
        path = tmp_path / "run"
        for step in (110, 50):
            (path / f"checkpoints/{step}").mkdir(parents=True)
        for name, content in files.items():
            suffix = ".yaml" if name == "config" else ".json"
            (path / f"{name}{suffix}").write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
        look(path).require(*kinds)

    return require


SETTINGS, EPOCHS = "train: {steps: 400}\n", "train: {epochs: 2.0}\n"
test_what_is_no_adapter_says_what_it_is = refusals(
    (required(ADAPTERS, config=SETTINGS), "run", 110, 400, "train"),
    (required(ADAPTERS, config=EPOCHS), "step", 110),
    (required(ADAPTERS, config=EPOCHS, summary="{}"), "adapter.json", "adapter_config.json"),
    (required(("run", "merged"), config=EPOCHS, summary="{}"), "adapter.json", "loraplus.json"),
    (required(ADAPTERS, config="sweep: {}\ntrain: {steps: 4}\n"), "110 of 4", "loraplus sweep"),
    (required(ADAPTERS, config="sweep: {}\n", summary="{}"), "sweep", "winner"),
    error=FileNotFoundError,
)
test_what_another_command_uses_says_so = refusals(
    (required(ADAPTERS, loraplus=RUN | {"merged": True}), "merged model", "exported from"),
    (required(ADAPTERS, loraplus=RUN), "GGUF adapter", "exported from"),
    (required(("run",), adapter_config={}), "no training settings", "loraplus train"),
)
