"""A run's identity: whatever changes the base model's function or the data is an error on every command."""

import dataclasses
import hashlib
import json
import shutil

import pytest
from tokenizers import Tokenizer

from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.provenance import check_allowed, check_identity, model_identity

from ..marks import slow
from ..messages import assert_mentions, mentions
from ..refusals import refusals
from .gpt2_world import write_gpt2
from .runs import ASKED, SHORT, printed, rejected, summary_of

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("fixture", "rewrite", "config"),
    [
        ("first_world", None, BertConfig),
        ("first_talk", None, LlamaConfig),
        ("first_talk", write_gpt2, GPT2Config),
    ],
)
def test_identity_holds_and_compares_every_field_of_the_models_config(
    tmp_path, request, fixture, rewrite, config
):
    world = request.getfixturevalue(fixture).copy(tmp_path)
    if rewrite:
        rewrite(world.model)
        world.change_config("data", template="plain")
    identity = model_identity(parse_settings(world.config), open_files(world.model), None)
    fields = identity["base"]["config"]
    assert fields.keys() == {field.name for field in dataclasses.fields(config)}
    for name, value in fields.items():
        other = identity | {"base": {"config": fields | {name: "other"}}}
        words = (f"base.config.{name}", json.dumps(value), "--allow_different base.config")
        with pytest.raises(ValueError, match=mentions(*words)):
            check_identity(world.out, {"identity": identity}, other)
        check_identity(world.out, {"identity": identity}, other, allow=["base.config"])
        check_identity(world.out, {"identity": identity}, other, allow=[f"base.config.{name}"])
        check_allowed([f"base.config.{name}"])


def compare(saved, **current):
    check_identity(
        "there", {"identity": saved}, {"base": {"config": {"a": 1, "b": 2}}, "tokenizer": "x"} | current
    )


CONFIG = "base.config.a", "base.config.b", "--allow_different base.config --allow_different tokenizer"
test_what_differs_and_what_cannot_be_compared_is_named = refusals(
    (lambda: compare({"base": {"config": {"a": 2, "b": 3}}, "tokenizer": "y"}), *CONFIG),
    (lambda: compare([]), "identity", "mapping"),
    (lambda: compare(5), "identity", 5),
    (lambda: compare("abc"), "identity", "'abc'"),
    (lambda: compare({"base": None}), "identity", None),
    (lambda: check_allowed(["weights"]), "base.weights", "'weights'"),
    (lambda: check_allowed(["base"]), "base.weights", "'base'"),
    (lambda: check_allowed(["base.config.nosuch"]), "base.weights", "'base.config.nosuch'"),
    (lambda: check_allowed(["data.bogus"]), "base.weights", "'data.bogus'"),
)


def padded_digest(world):
    """The digest of an encoder's tokenizer in adapters of versions that padded texts to `data.max_length`."""
    tokenizer = Tokenizer.from_file(str(world.model / "tokenizer.json"))
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=12)
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def test_the_digest_of_a_tokenizer_with_its_padding_is_that_of_earlier_versions(first_world):
    saved = {"identity": {"tokenizer": padded_digest(first_world)}}
    settings, files = parse_settings(first_world.config), open_files(first_world.model)
    check_identity(first_world.out, saved, model_identity(settings, files, None, saved=saved))
    today = model_identity(settings, files, None)
    assert model_identity(settings, files, None, saved={"identity": today}) == today
    other = {"identity": {"tokenizer": "0" * 16}}
    with pytest.raises(ValueError, match=mentions("tokenizer", "0" * 16, today["tokenizer"])):
        check_identity(first_world.out, other, model_identity(settings, files, None, saved=other))


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


encoder = pytest.mark.parametrize("run", ["finished"], indirect=True)
talk_model = pytest.mark.parametrize("run", ["finished_talk"], indirect=True)
ALL = ("eval", "predict", "export", "export --merged", "resume", "init_adapter")


@pytest.mark.parametrize(
    ("run", "change", "names", "words"),
    [
        slow("finished", edit_weights, ALL, ("base.weights",)),
        slow("finished", swap_labels, ("eval", "resume"), ("data.test",)),
        slow("finished_talk", edit_template, ("eval", "predict", "export --merged"), ("chat_template",)),
    ],
    indirect=["run"],
)
def test_a_changed_part_is_an_error_on_every_command(run, tmp_path, capsys, change, names, words):
    change(run)
    for name in names:
        assert_mentions(rejected(capsys, *commands(run, tmp_path)[name]), *words, "--allow_different")
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "new").exists()
    part = next(part for part in ("base.config", "data", words[0]) if words[0].startswith(part))
    printed(capsys, "eval", run.out, "--allow_different", part)


@pytest.mark.slow
@encoder
def test_a_resumed_run_may_differ_in_what_it_is_allowed(run, tmp_path, capsys):
    change_json(run.model / "config.json", {"layer_norm_eps": 1e-3})
    error = rejected(capsys, *commands(run, tmp_path)["resume"])
    assert_mentions(error, "base.config.layer_norm_eps", 1e-12, 0.001, "--allow_different")
    run.trained("--train.steps", "44", "--allow_different", "base.config.layer_norm_eps")
    (line,) = summary_of(run.out)["allowed_differences"]
    assert_mentions(line, "base.config.layer_norm_eps", 1e-12, 0.001)
    # From its checkpoint on, the run is one of the changed model.
    run.trained("--train.steps", "48")


@pytest.mark.slow
@encoder
def test_an_adapter_for_another_base_that_a_run_begins_with_is_told(run, tmp_path, capsys):
    change_json(run.model / "config.json", {"layer_norm_eps": 1e-3})
    words = ("train", run.config, "--output_dir", tmp_path / "new", "--init_adapter", run.out, *SHORT)
    assert_mentions(rejected(capsys, *words), "base.config.layer_norm_eps", 1e-12, 0.001)
    printed(capsys, *words, "--allow_different", "base.config.layer_norm_eps")
    (line,) = summary_of(tmp_path / "new")["allowed_differences"]
    assert_mentions(line, "init_adapter", run.out, "base.config.layer_norm_eps", 1e-12, 0.001)


@pytest.mark.slow
@encoder
def test_every_command_reads_the_adapter_of_a_version_that_padded_texts(run, tmp_path, capsys):
    now = shutil.copytree(run.out / "adapter", tmp_path / "now")
    path = run.out / "adapter/adapter.json"
    notes = json.loads(path.read_text())
    del notes["digest"]
    notes["identity"]["tokenizer"] = padded_digest(run)
    path.write_text(json.dumps(notes))
    alone = shutil.copytree(run.out / "adapter", tmp_path / "alone")
    asked = ("--text", "the film was good")
    printed(capsys, "eval", alone)
    printed(capsys, "predict", alone, *asked)
    printed(capsys, "predict", run.model, "--adapter", f"old={alone}", *asked)
    printed(capsys, "export", alone, "--to", tmp_path / "peft")
    printed(capsys, "export", alone, "--to", tmp_path / "merged", "--merged")
    printed(capsys, "train", run.config, "--output_dir", tmp_path / "new", "--init_adapter", alone, *SHORT)
    for out, two in ((tmp_path / "old-now", (alone, now)), (tmp_path / "now-old", (now, alone))):
        printed(capsys, "combine", *two, "--how", "cat", "--out", out)
        printed(capsys, "predict", out, *asked)
    today = model_identity(parse_settings(run.config), open_files(run.model), None)["tokenizer"]
    for name in ("peft/loraplus.json", "merged/loraplus.json", "new/adapter/adapter.json"):
        assert json.loads((tmp_path / name).read_text())["identity"]["tokenizer"] == today


@pytest.mark.slow
def test_a_merged_model_is_a_base_model_of_its_own(finished, tmp_path, capsys):
    merged = tmp_path / "merged"
    printed(capsys, "export", finished.out, "--to", merged, "--merged")
    printed(capsys, "eval", merged)
    change_json(merged / "config.json", {"layer_norm_eps": 1e-3})
    assert_mentions(rejected(capsys, "eval", merged), "base.config.layer_norm_eps", 1e-12, 0.001)


def test_a_part_that_is_compared_with_nothing_has_no_effect(first_world, tmp_path, capsys):
    command = ("train", first_world.config, "--output_dir", tmp_path / "out", "--allow_different", "data")
    assert_mentions(rejected(capsys, *command), "--allow_different data", "nothing to resume", "init_adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@encoder
def test_an_adapter_whose_description_was_changed_is_rejected(run, capsys):
    path = run.out / "adapter/adapter.json"
    notes = json.loads(path.read_text())
    notes["task"]["names"].reverse()
    path.write_text(json.dumps(notes))
    assert_mentions(rejected(capsys, "eval", run.out), "digest")


@pytest.mark.slow
@talk_model
def test_an_adapter_of_peft_has_no_identity(run, tmp_path, capsys):
    to = tmp_path / "peft"
    printed(capsys, "export", run.out, "--to", to)
    (to / "loraplus.json").unlink()
    change_json(run.model / "config.json", {"rms_norm_eps": 1e-3})
    printed(capsys, "generate", to, *ASKED)
