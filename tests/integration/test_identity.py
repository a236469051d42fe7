"""A run's identity: whatever changes the base model's function or the data is an error on every command."""

import contextlib
import dataclasses
import json
import shutil

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.llama.config import LlamaConfig

from ..marks import every, long
from ..messages import assert_mentions

pytestmark = pytest.mark.slow

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


GPT2 = {
    "model_type": None,  # the only one
    "vocab_size": None,
    "hidden_size": {"n_embd": 64},
    "num_hidden_layers": {"n_layer": 1},
    "num_attention_heads": {"n_head": 8},
    "intermediate_size": {"n_inner": 64},
    "max_position_embeddings": {"n_positions": 60},
    "activation_function": {"activation_function": "relu"},
    "layer_norm_epsilon": {"layer_norm_epsilon": 1e-2},
    "scale_attn_weights": {"scale_attn_weights": False},
    "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "tie_word_embeddings": None,
    "initializer_range": {"initializer_range": 0.5},
    "split_fused": None,  # a setting of the run, not an entry of the file
}


@pytest.mark.parametrize(
    ("config", "changes"), [(BertConfig, ENCODER), (LlamaConfig, LANGUAGE), (GPT2Config, GPT2)]
)
def test_every_field_of_a_model_config_is_in_the_table(config, changes):
    assert {field.name for field in dataclasses.fields(config)} == changes.keys()


def change_json(path, entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def error(capsys, *arguments):
    """The message of a command that must fail."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def commands(world, tmp_path, predict):
    """Every command that reads a run's base model."""
    steps = ("train", world.config, "--output_dir", world.out, "--train.steps", "60")
    return {
        "eval": ("eval", world.out),
        "predict": predict,
        "export": ("export", world.out, "--to", tmp_path / "exported"),
        "export --merged": ("export", world.out, "--to", tmp_path / "exported", "--merged"),
        "resume": steps,
        "init_adapter": (
            "train",
            world.config,
            "--output_dir",
            tmp_path / "new",
            "--init_adapter",
            world.out,
        ),
    }


def check(world, tmp_path, capsys, predict, field, entries):
    change_json(world.model / "config.json", entries)
    value = json.loads((world.out / "adapter/adapter.json").read_text())["identity"]["base"]["config"][field]
    for name, arguments in commands(world, tmp_path, predict).items():
        message = error(capsys, *arguments)
        if name != "resume":  # there a changed shape or a batch too long is found first
            assert_mentions(
                message, f"base.config.{field}", json.dumps(value), "--allow_different base.config"
            )
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def restored(world, tmp_path):
    """The world, which a test may change: checkpoints know its paths, so a copy elsewhere is another run."""
    shutil.copytree(world.directory, tmp_path / "backup")
    yield world
    shutil.rmtree(world.directory)
    shutil.copytree(tmp_path / "backup", world.directory)


@pytest.fixture
def encoder(finished, tmp_path):
    with restored(finished, tmp_path) as world:
        yield world


@pytest.fixture
def talk_model(finished_talk, tmp_path):
    with restored(finished_talk, tmp_path) as world:
        yield world


@pytest.mark.parametrize("field", every(3, [name for name, entries in ENCODER.items() if entries]))
def test_a_changed_encoder(encoder, tmp_path, capsys, field):
    world = encoder
    predict = ("predict", world.out, "--text", "the film was good")
    check(world, tmp_path, capsys, predict, field, ENCODER[field])


@pytest.mark.parametrize("field", every(3, [name for name, entries in LANGUAGE.items() if entries]))
def test_a_changed_language_model(talk_model, tmp_path, capsys, field):
    world = talk_model
    predict = ("generate", world.out, "--prompt", "what colour is snow")
    check(world, tmp_path, capsys, predict, field, LANGUAGE[field])


@pytest.mark.parametrize("size", [400, 999])
def test_a_changed_vocabulary_size_of_a_language_model(talk_model, tmp_path, capsys, size):
    world = talk_model
    change_json(world.model / "config.json", {"vocab_size": size})
    predict = ("generate", world.out, "--prompt", "what colour is snow")
    for arguments in commands(world, tmp_path, predict).values():
        assert_mentions(error(capsys, *arguments), size, 415 if size == 999 else 414)
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


@pytest.mark.parametrize(
    ("part", "change", "names"),
    [
        ("base.weights", edit_weights, None),
        long("tokenizer", edit_tokenizer, None),
        ("data.test", swap_labels, ("eval", "resume")),
    ],
)
def test_other_parts_of_an_encoder(encoder, tmp_path, capsys, part, change, names):
    world = encoder
    change(world)
    predict = ("predict", world.out, "--text", "the film was good")
    for name, arguments in commands(world, tmp_path, predict).items():
        if names is None or name in names:
            assert_mentions(error(capsys, *arguments), part, "--allow_different")
    assert main(["eval", str(world.out), "--allow_different", part.partition(".test")[0]]) == 0


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
def test_other_parts_of_a_language_model(talk_model, tmp_path, capsys, part, change):
    world = talk_model
    change(world)
    predict = ("generate", world.out, "--prompt", "what colour is snow")
    for arguments in commands(world, tmp_path, predict).values():
        assert_mentions(error(capsys, *arguments), part, "--allow_different")
    ask = (*predict, "--max_tokens", "8", "--allow_different", part)
    assert main([str(a) for a in ask]) == 0


def test_a_merged_model_is_a_base_model_of_its_own(finished, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["export", str(finished.out), "--to", str(merged), "--merged"]) == 0
    assert main(["eval", str(merged)]) == 0
    change_json(merged / "config.json", {"layer_norm_eps": 1e-3})
    assert_mentions(error(capsys, "eval", merged), "base.config.layer_norm_eps", 1e-12, 0.001)


def test_a_resumed_run_may_differ_in_what_it_is_allowed(encoder, capsys):
    world = encoder
    change_json(world.model / "config.json", {"layer_norm_eps": 1e-3})
    longer = ("train", world.config, "--output_dir", world.out, "--train.steps", "60")
    assert_mentions(error(capsys, *longer), "base.config.layer_norm_eps", "--allow_different")
    assert main([*map(str, longer), "--allow_different", "base.config.layer_norm_eps"]) == 0
    # From its checkpoint on, the run is one of the changed model.
    assert main([*map(str, longer[:-1]), "80"]) == 0


@pytest.mark.parametrize("part", ["weights", "base", "base.config.nosuch", "data.bogus"])
def test_an_unknown_part_is_named(finished, capsys, part):
    message = error(capsys, "eval", finished.out, "--allow_different", part)
    assert_mentions(message, "base.weights", f"'{part}'")


def test_all_parts_that_differ_are_named_at_once(encoder, capsys):
    edit_tokenizer(encoder)
    change_json(encoder.model / "config.json", {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"})
    message = error(capsys, "eval", encoder.out)
    parts = "--allow_different base.config --allow_different tokenizer"
    assert_mentions(message, "base.config.layer_norm_eps", "base.config.hidden_act", parts)


def test_a_part_that_is_compared_with_nothing_has_no_effect(first_world, tmp_path, capsys):
    command = ("train", first_world.config, "--output_dir", tmp_path / "out", "--allow_different", "data")
    assert_mentions(error(capsys, *command), "--allow_different data", "checkpoint", "init_adapter")
    assert not (tmp_path / "out").exists()


def edit_label_names(notes):
    notes["task"]["names"].reverse()


def without_digest(**values):
    """As another version may have written it."""

    def edit(notes):
        del notes["digest"]
        notes |= values

    return edit


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
def test_an_adapter_whose_description_was_changed_is_rejected(encoder, capsys, edit, word):
    path = encoder.out / "adapter/adapter.json"
    notes = json.loads(path.read_text())
    edit(notes)
    path.write_text(json.dumps(notes))
    assert_mentions(error(capsys, "eval", encoder.out), word)


def test_an_adapter_of_peft_has_no_identity(talk_model, tmp_path):
    to = tmp_path / "peft"
    assert main(["export", str(talk_model.out), "--to", str(to)]) == 0
    (to / "loraplus.json").unlink()
    change_json(talk_model.model / "config.json", {"rms_norm_eps": 1e-5})
    assert main(["generate", str(to), "--prompt", "what colour is snow", "--max_tokens", "8"]) == 0
