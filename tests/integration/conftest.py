"""A tiny world for whole runs: a random BERT directory, texts whose label is one of their words, and a config."""

import base64
import contextlib
import csv
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep import run as sweeping
from loraplus_jax.sweep.figures import PICTURES
from loraplus_jax.training import trainer

from .. import tiny
from . import language_world as language
from .kinds import runs_of
from .runs import ASKED, PROMPT, last_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FILLERS = [
    *("the", "a", "this", "that", "one", "film", "book", "song", "play", "tale"),
    *("was", "is", "seems", "felt", "looked", "so", "very", "quite", "rather", "too"),
]
MARKS = {"good": "yes", "bad": "no"}
RATINGS = {"good": 3.0, "bad": -3.0}
HIDDEN, LAYERS, INNER, POSITIONS = 16, 2, 32, 24


@dataclasses.dataclass(frozen=True)
class World:
    """Where everything lies, and `loraplus` run on it in this process."""

    directory: Path

    @property
    def model(self):
        return self.directory / "model"

    @property
    def data(self):
        return self.directory / "texts.csv"

    @property
    def config(self):
        return self.directory / "config.yaml"

    @property
    def out(self):
        return self.directory / "out"

    @property
    def printed(self):
        return self.directory / "printed.txt"

    @property
    def ask(self):
        """The command that uses a run on a text."""
        return ("predict", self.out, "--text", "the film was good")

    def train(self, *overrides, out=None):
        """`loraplus train`; `out` is where, unless an override says so."""
        place = () if "--output_dir" in overrides else ("--output_dir", str(out or self.out))
        return main(["train", str(self.config), *last_of(*place, *overrides)])

    def trained(self, *overrides, out=None):
        """The directory of a run that must end well."""
        assert self.train(*overrides, out=out) == 0
        return out or self.out

    def rejected(self, capsys, *overrides):
        """The one line by which `loraplus train` ends before it has begun."""
        capsys.readouterr()
        assert self.train(*overrides) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    def copy(self, directory):
        """The same world in another directory, a run in it included; all paths point there."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        for name in ("config.yaml", "out/config.yaml", "out/adapter/adapter.json"):
            if (path := directory / name).exists():
                path.write_text(path.read_text().replace(str(self.directory), str(directory)))
        return type(self)(directory)

    def rows(self):
        with self.data.open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write_rows(self, name, rows):
        """Rows as .csv, .tsv or .jsonl; returns the file."""
        path = self.directory / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return path
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path

    def change_config(self, section=None, **values):
        """Fields of the YAML file, or of one of its sections, replaced; None takes a field out."""
        content = yaml.safe_load(self.config.read_text())
        place = content if section is None else content.setdefault(section, {})
        place |= values
        for name in [name for name, value in values.items() if value is None]:
            del place[name]
        self.config.write_text(yaml.safe_dump(content))

    def change_tensors(self, change):
        """`change(tensors)` edits the weights' file."""
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


class LanguageWorld(World):
    """The same with a language model and conversations."""

    @property
    def data(self):
        return self.directory / "chats.jsonl"

    @property
    def ask(self):
        return ("generate", self.out, *ASKED)

    def rows(self):
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def describe(self, **generation):
        """Changes the task to generation, with descriptions in separate files."""
        rows = language.descriptions()
        parts = {"train": rows[:96], "test": rows[96:]}
        files = {name: str(self.write_rows(f"{name}.csv", part)) for name, part in parts.items()}
        self.change_config("data", path=None, template="completion", max_length=48, **files)
        self.change_config("train", prompt=None, prompt_tokens=None)
        self.change_config("generation", **generation)
        self.change_config(task="generation")


def _write_config(world, batch_size, data, targets, **more):
    content = {
        "model": {"path": str(world.model)},
        "data": {"path": str(world.data)} | data,
        "lora": {"target_modules": targets, "rank": 4, "lr_ratio": 4},
        # A constant rate: then runs of any length share their compiled programs.
        "optimizer": {"learning_rate": 5e-3, "schedule": "constant", "warmup_steps": 2, "max_grad_norm": 1.0},
        "train": {
            "steps": 40,
            "batch_size": batch_size,
            "eval_every": 20,
            "log_every": 5,
            "eval_batch_size": 16,
        },
        "mesh": {"data": 1},
        "output_dir": str(world.out),
    }
    world.config.write_text(yaml.safe_dump(content | more, sort_keys=False))


@pytest.fixture(scope="session")
def first_world(tmp_path_factory):
    """The one that is copied and never changed."""
    world = World(tmp_path_factory.mktemp("world"))
    world.model.mkdir()
    _write_model(world.model)
    world.write_rows("texts.csv", _texts(160))
    _write_config(world, 32, {"max_length": 12}, ["query", "value", "up"])
    world.change_config("model", dropout=0.0, head_dropout=0.0)
    return world


@pytest.fixture(scope="session")
def first_talk(tmp_path_factory):
    """That of language models."""
    world = LanguageWorld(tmp_path_factory.mktemp("talk"))
    world.model.mkdir()
    language.write_model(world.model)
    world.write_rows("chats.jsonl", language.chats())
    world.write_rows("questions.jsonl", language.questions())
    _write_config(world, 16, {"max_length": 32}, language.PRODUCTS, task="instruction")
    world.change_config("train", prompt=PROMPT, prompt_tokens=8)
    return world


SMALLEST_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def _draw_nothing(patch):
    def draw(directory, report, names=None):
        for name in names or PICTURES:
            (directory / f"{name}.png").write_bytes(SMALLEST_PNG)

    patch.setattr(trainer, "draw_loss", lambda *_: None)
    patch.setattr(sweeping, "draw_figures", draw)


@pytest.fixture
def undrawn(monkeypatch):
    """No run draws a picture, and a sweep the smallest: that takes as long as all else."""
    _draw_nothing(monkeypatch)


@pytest.fixture
def world(first_world, tmp_path, cache, monkeypatch):
    """A fresh copy, whose runs are `undrawn`."""
    _draw_nothing(monkeypatch)
    return first_world.copy(tmp_path)


@pytest.fixture
def talk(first_talk, tmp_path, cache, monkeypatch):
    """A fresh copy of that of language models, whose runs are `undrawn`."""
    _draw_nothing(monkeypatch)
    return first_talk.copy(tmp_path)


@pytest.fixture(scope="session")
def run_of(first_world, first_talk, tmp_path_factory):
    """The run of a kind; its world, its results and its exports are to be read only."""
    worlds = {"first_world": first_world, "first_talk": first_talk}
    return runs_of(worlds, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def finished(run_of, cache_directory):
    """A world with a whole run in it, to be read only; alone among worlds it has a picture."""
    with _cached(cache_directory):
        return run_of("bert").finished


@pytest.fixture(scope="session")
def finished_talk(run_of, cache_directory):
    """That of language models, without a picture."""
    with _cached(cache_directory):
        return run_of("chat").finished


@pytest.fixture(scope="session")
def cache_directory(tmp_path_factory):
    """Of this test session's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache(cache_directory):
    """The cache in use."""
    with _cached(cache_directory):
        yield cache_directory


@contextlib.contextmanager
def _cached(directory):
    """Even programs that compile fast are kept in the directory."""
    old = {name: jax.config.values[name] for name in CACHE_OPTIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLUS_CACHE", str(directory))
        # Where a run's own cache is, so that commands without one use it too.
        _set_options(CACHE_OPTIONS | {"jax_compilation_cache_dir": str(directory / "xla")})
        yield
    _set_options(old)


CACHE_OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_disable_most_optimizations": True,  # compiling is most of what a tiny run does
}


def _set_options(options):
    for name, value in options.items():
        jax.config.update(name, value)
    # Whether the cache is in use is decided at the process's first compilation; this makes it forget.
    reset_cache()


def _texts(count):
    """Distinct texts with one mark each: rows of text, label and rating."""
    rng = np.random.default_rng(0)
    rows = {}
    while len(rows) < count:
        mark = list(MARKS)[len(rows) % len(MARKS)]
        words = [*rng.choice(FILLERS, rng.integers(2, 5)), mark]
        text = " ".join(rng.permutation(words))
        rows[text] = {"text": text, "label": MARKS[mark], "rating": RATINGS[mark]}
    return list(rows.values())


def _write_model(directory):
    words = [*SPECIAL, *FILLERS, *MARKS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "max_position_embeddings": POSITIONS}
    config = tiny.config("bert", vocab_size=len(words), num_hidden_layers=LAYERS, **sizes)
    (directory / "config.json").write_text(json.dumps(config))
    pooler = np.random.default_rng(1).normal(size=(HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)
    weights = {
        "pooler.dense.weight": pooler.astype(np.float32),
        "pooler.dense.bias": np.zeros(HIDDEN, np.float32),
    }
    save_file(tiny.tensors(config, seed=1) | weights, directory / "model.safetensors")
