"""Every file of a language model that its identity depends on; `integration/test_identity.py` has the commands."""

import json

import pytest

from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings
from loraplus_jax.training.provenance import model_identity

from ..integration import language_world as tiny

FILES = {
    "base": ("config.json", lambda config: config | {"rope_theta": 5e5}),
    "tokenizer": ("tokenizer.json", lambda content: content | {"normalizer": {"type": "Lowercase"}}),
    "special_tokens": ("tokenizer_config.json", lambda names: names | {"eos_token": tiny.END}),
    "chat_template": ("tokenizer_config.json", lambda names: names | {"chat_template": "{{ messages }}"}),
}


@pytest.mark.parametrize("part", FILES)
def test_a_changed_file_of_a_language_model_changes_its_part_alone(tmp_path, part):
    tiny.write_model(tmp_path)
    settings = Settings(
        model=ModelSettings(path=str(tmp_path)),
        data=DataSettings(path="d", max_length=32),
        task="instruction",
        output_dir="o",
    )
    before = model_identity(settings, tmp_path, None)
    name, change = FILES[part]
    path = tmp_path / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    after = model_identity(settings, tmp_path, None)
    assert before.keys() == after.keys() == FILES.keys()
    assert [part for part in FILES if before[part] != after[part]] == [part]
