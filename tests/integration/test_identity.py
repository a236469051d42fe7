"""A run's identity: whatever changes the base model's function or the data is an error on every command."""

import dataclasses
import json
import shutil

import pytest

from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.llama.config import LlamaConfig

from ..marks import long
from ..messages import assert_mentions
from .runs import ASKED, printed, rejected

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

# A changed value of every field of a model's config, as in config.json: {our field: entries of the file}.
ENCODER = {
    "model_type": None,  # another architecture has other tensors
    "vocab_size": {"vocab_size": 30},
    "hidden_size": {"hidden_size": 32},
    "num_hidden_layers": {"num_hidden_layers": 1},
    "num_attention_heads": {"num_attention_heads": 8},
    "intermediate_size": {"intermediate_size": 24},
    "max_position_embeddings": {"max_position_embeddings": 20},
    "type_vocab_size": {"type_vocab_size": 3},
    "pad_token_id": {"pad_token_id": 1},
    "hidden_act": {"hidden_act": "gelu_new"},
    "layer_norm_eps": {"layer_norm_eps": 1e-3},
    "hidden_dropout_prob": {"hidden_dropout_prob": 0.3},
    "attention_probs_dropout_prob": {"attention_probs_dropout_prob": 0.3},
    "initializer_range": {"initializer_range": 0.5},
}
LANGUAGE = {
    "model_type": {"model_type": "mistral"},
    "vocab_size": None,  # below: the tokenizer and the tensors allow one value
    "hidden_size": {"hidden_size": 64},
    "num_hidden_layers": {"num_hidden_layers": 1},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "intermediate_size": {"intermediate_size": 64},
    "max_position_embeddings": {"max_position_embeddings": 80},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "rope_theta": {"rope_theta": 5e5},
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tie_word_embeddings": None,  # decides which tensors there are
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act": {"hidden_act": "gelu"},
    # No Llama has one of these.
    **dict.fromkeys(("sliding_window", "full_layers", "partial_rotary_factor", "rope_local_theta")),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")),
    "initializer_range": {"initializer_range": 0.5},
    "split_fused": None,  # a setting of the run, not an entry of the file
}


@pytest.mark.parametrize(("config", "changes"), [(BertConfig, ENCODER), (LlamaConfig, LANGUAGE)])
def test_every_field_of_a_model_config_is_in_the_table(config, changes):
    assert {field.name for field in dataclasses.fields(config)} == changes.keys()


def change_json(path, entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def commands(world, tmp_path):
    """Every command that reads a run's base model."""
    train = ("train", world.config, "--output_dir")
    return {
        "eval": ("eval", world.out),
        "predict": world.ask,
        "export": ("export", world.out, "--to", tmp_path / "exported"),
        "export --merged": ("export", world.out, "--to", tmp_path / "exported", "--merged"),
        "resume": (*train, world.out, "--train.steps", "60"),
        "init_adapter": (*train, tmp_path / "new", "--init_adapter", world.out),
    }


@pytest.fixture
def run(request, tmp_path):
    """A finished run that a test may change: checkpoints know its paths, so a copy elsewhere is another run."""
    world = request.getfixturevalue(request.param)
    shutil.copytree(world.directory, tmp_path / "backup")
    yield world
    shutil.rmtree(world.directory)
    shutil.copytree(tmp_path / "backup", world.directory)


encoder = pytest.mark.parametrize("run", ["finished"], indirect=True)
talk_model = pytest.mark.parametrize("run", ["finished_talk"], indirect=True)


BY_EVERY_COMMAND = ("layer_norm_eps", "rms_norm_eps")
"""All commands compare in one place: one field of each model shows that they do."""


@pytest.mark.parametrize(
    ("run", "field", "entries"),
    [
        (world, field, entries) if n % 4 == 0 or field in BY_EVERY_COMMAND else long(world, field, entries)
        for n, (world, field, entries) in enumerate(
            (world, field, entries)
            for world, table in {"finished": ENCODER, "finished_talk": LANGUAGE}.items()
            for field, entries in table.items()
            if entries
        )
    ],
    indirect=["run"],
)
def test_a_changed_field_of_the_models_config(run, tmp_path, capsys, field, entries):
    change_json(run.model / "config.json", entries)
    value = json.loads((run.out / "adapter/adapter.json").read_text())["identity"]["base"]["config"][field]
    words = (f"base.config.{field}", json.dumps(value), "--allow_different base.config")
    for name, arguments in commands(run, tmp_path).items():
        if name == "eval" or field in BY_EVERY_COMMAND:
            assert_mentions(rejected(capsys, *arguments), *words)
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "new").exists()


@talk_model
@pytest.mark.parametrize("size", [400, 999])
def test_a_changed_vocabulary_size_of_a_language_model(run, tmp_path, capsys, size):
    change_json(run.model / "config.json", {"vocab_size": size})
    for arguments in commands(run, tmp_path).values():
        assert_mentions(rejected(capsys, *arguments), size, 415 if size == 999 else 414)
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "new").exists()


def edit_tokenizer(world):
    path = world.model / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"fine"'))


def edit_template(world):
    path = world.model / "tokenizer_config.json"
    change_json(path, {"chat_template": json.loads(path.read_text())["chat_template"].replace("\n", " ")})


def swap_labels(world):
    rows = world.rows()
    for row in rows:
        row["label"] = {"yes": "no", "no": "yes"}[row["label"]]
    world.write_rows("texts.csv", rows)


def edit_weights(world):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("query.weight"))
        tensors[name] = tensors[name] + 1

    world.change_tensors(change)


@encoder
@pytest.mark.parametrize(
    ("part", "change", "names"),
    [
        ("base.weights", edit_weights, None),
        long("tokenizer", edit_tokenizer, None),
        ("data.test", swap_labels, ("eval", "resume")),
    ],
)
def test_other_parts_of_an_encoder(run, tmp_path, capsys, part, change, names):
    change(run)
    for name, arguments in commands(run, tmp_path).items():
        if names is None or name in names:
            assert_mentions(rejected(capsys, *arguments), part, "--allow_different")
    printed(capsys, "eval", run.out, "--allow_different", part.partition(".test")[0])


@talk_model
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("chat_template", edit_template),
        long(
            "special_tokens.eos",
            lambda w: change_json(w.model / "tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ),
        (
            "special_tokens.stop",
            lambda w: (w.model / "generation_config.json").write_text('{"eos_token_id": 5}'),
        ),
    ],
)
def test_other_parts_of_a_language_model(run, tmp_path, capsys, part, change):
    change(run)
    for arguments in commands(run, tmp_path).values():
        assert_mentions(rejected(capsys, *arguments), part, "--allow_different")
    printed(capsys, *run.ask, "--allow_different", part)


def test_a_merged_model_is_a_base_model_of_its_own(finished, tmp_path, capsys):
    merged = tmp_path / "merged"
    printed(capsys, "export", finished.out, "--to", merged, "--merged")
    printed(capsys, "eval", merged)
    change_json(merged / "config.json", {"layer_norm_eps": 1e-3})
    assert_mentions(rejected(capsys, "eval", merged), "base.config.layer_norm_eps", 1e-12, 0.001)


@encoder
def test_a_resumed_run_may_differ_in_what_it_is_allowed(run, capsys):
    change_json(run.model / "config.json", {"layer_norm_eps": 1e-3})
    error = run.rejected(capsys, "--train.steps", "60")
    assert_mentions(error, "base.config.layer_norm_eps", "--allow_different")
    run.trained("--train.steps", "60", "--allow_different", "base.config.layer_norm_eps")
    # From its checkpoint on, the run is one of the changed model.
    run.trained("--train.steps", "80")


@pytest.mark.parametrize("part", ["weights", "base", "base.config.nosuch", "data.bogus"])
def test_an_unknown_part_is_named(finished, capsys, part):
    message = rejected(capsys, "eval", finished.out, "--allow_different", part)
    assert_mentions(message, "base.weights", f"'{part}'")


@encoder
def test_all_parts_that_differ_are_named_at_once(run, capsys):
    edit_tokenizer(run)
    change_json(run.model / "config.json", {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"})
    message = rejected(capsys, "eval", run.out)
    parts = "--allow_different base.config --allow_different tokenizer"
    assert_mentions(message, "base.config.layer_norm_eps", "base.config.hidden_act", parts)


def test_a_part_that_is_compared_with_nothing_has_no_effect(first_world, tmp_path, capsys):
    command = ("train", first_world.config, "--output_dir", tmp_path / "out", "--allow_different", "data")
    assert_mentions(rejected(capsys, *command), "--allow_different data", "checkpoint", "init_adapter")
    assert not (tmp_path / "out").exists()


def edit_label_names(notes):
    notes["task"]["names"].reverse()


def without_digest(**values):
    """As another version may have written it."""

    def edit(notes):
        del notes["digest"]
        notes |= values

    return edit


@encoder
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (edit_label_names, "digest"),
        *((without_digest(identity=value), "identity") for value in ([], 5, "abc", {"base": None})),
        *(
            (without_digest(task={"kind": "classification", "names": names}), "task.names")
            for names in ([1, 2], [["a"], "b"])
        ),
    ],
)
def test_an_adapter_whose_description_was_changed_is_rejected(run, capsys, edit, word):
    path = run.out / "adapter/adapter.json"
    notes = json.loads(path.read_text())
    edit(notes)
    path.write_text(json.dumps(notes))
    assert_mentions(rejected(capsys, "eval", run.out), word)


@talk_model
def test_an_adapter_of_peft_has_no_identity(run, tmp_path, capsys):
    to = tmp_path / "peft"
    printed(capsys, "export", run.out, "--to", to)
    (to / "loraplus.json").unlink()
    change_json(run.model / "config.json", {"rms_norm_eps": 1e-3})
    printed(capsys, "generate", to, *ASKED)
