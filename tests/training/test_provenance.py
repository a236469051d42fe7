"""Every file of a language model that its identity depends on; `integration/test_identity.py` has the commands."""

import json

import pytest

from loraplus_jax.data.options import DataOptions
from loraplus_jax.models.files import open_files
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.schema import Settings
from loraplus_jax.training.provenance import check_identity, check_record, model_identity

from ..integration import language_world as tiny
from ..messages import mentions
from ..refusals import refusals

FILES = {
    "base": ("config.json", lambda config: config | {"rope_theta": 5e5}),
    "tokenizer": ("tokenizer.json", lambda content: content | {"normalizer": {"type": "Lowercase"}}),
    "special_tokens": ("tokenizer_config.json", lambda names: names | {"eos_token": tiny.END}),
    "chat_template": ("tokenizer_config.json", lambda names: names | {"chat_template": "{{ messages }}"}),
}
STOP = ("special_tokens", ("generation_config.json", lambda _: {"eos_token_id": 5}))


@pytest.mark.parametrize(("part", "edit"), [*FILES.items(), STOP])
def test_a_changed_file_of_a_language_model_changes_its_part_alone(tmp_path, part, edit):
    tiny.write_model(tmp_path)
    parts = {"model": ModelOptions(path=str(tmp_path)), "data": DataOptions(path="d", max_length=32)}
    settings = Settings(task="instruction", output_dir="o", **parts)
    before = model_identity(settings, open_files(tmp_path), None)
    name, change = edit
    path = tmp_path / name
    path.write_text(json.dumps(change(json.loads(path.read_text()) if path.exists() else {})))
    after = model_identity(settings, open_files(tmp_path), None)
    assert before.keys() == after.keys() == FILES.keys()
    assert [part for part in FILES if before[part] != after[part]] == [part]


RECORD = {"base": "b1", "identity": {"data": {"train": "d1"}}, "settings": {"train": {"steps": 8}}}
RECORD["jax_config"] = {"jax_default_prng_impl": "threefry2x32"}


def of_another(**other):
    return lambda tmp_path: check_record(tmp_path, RECORD, RECORD | other)


test_what_was_made_with_something_else = refusals(
    (of_another(base="b2"), "base.weights", "--allow_different base.weights"),
    (of_another(identity={"data": {"train": "d2"}}), "data.train", "--allow_different data"),
    (of_another(settings={"train": {"steps": 9}}), "settings.train.steps", 8, 9, "--fresh"),
    (
        of_another(jax_config={"jax_default_prng_impl": "rbg"}),
        *("jax_config.jax_default_prng_impl", "threefry2x32", "rbg", "--fresh"),
    ),
    lines=9,
)


def test_what_an_earlier_version_did_not_record_is_not_compared(tmp_path):
    saved = {name: RECORD[name] for name in ("base", "identity")} | {"settings": {"train": {}}}
    check_record(tmp_path, saved, RECORD)
    check_record(tmp_path, {}, RECORD)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_an_earlier_version_recorded_the_scaling_of_positions_as_pairs(tmp_path, scaling):
    def check(saved):
        configs = ({"rope_scaling": value} for value in (saved, scaling))
        old, new = ({"base": {"config": config}} for config in configs)
        check_identity(tmp_path, {"identity": old}, new)

    check([["rope_type", "linear"], ["factor", 2]] if scaling else [])
    with pytest.raises(ValueError, match=mentions("rope_scaling", 3)):
        check([["rope_type", "linear"], ["factor", 3]])
