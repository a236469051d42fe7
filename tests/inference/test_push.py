"""Uploads to a Hub that is only a fake: nothing leaves the machine."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from loraplus_jax.inference import push
from loraplus_jax.inference.push import public_settings

from ..integration.runs import ended, printed, rejected, started
from ..messages import assert_mentions

pytestmark = pytest.mark.usefixtures("cache")

TOKEN = "hf_secret"
BASE = ("--base_model", "org/base")
NAMES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "loraplus.json",
    "loraplus.safetensors",
}


class Hub:
    """A Hub that keeps what it is sent."""

    def __init__(self):
        self.repositories, self.files, self.error, self.endpoint = {}, {}, None, "https://huggingface.co"

    def __call__(self, **options):
        assert "token" not in options  # the library finds it itself
        return self

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, private)

    def repo_info(self, name):
        files = [SimpleNamespace(rfilename=file) for file in (".gitattributes", *self.files)]
        return SimpleNamespace(private=self.repositories[name], siblings=files)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error is not None:
            raise self.error
        kept = {name: text for name, text in self.files.items() if name not in delete_patterns}
        self.files = kept | {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.folder = folder_path


def assert_no_local_path(files, world):
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert str(world.directory) not in content.decode(), name
            assert "/home/" not in content.decode(), name


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return hub


@pytest.mark.slow
def test_an_adapter_is_pushed_privately_and_without_local_paths(untrained, hub, capsys):
    out = printed(capsys, "export", untrained.out, "--push", "org/name", *BASE)
    assert out == "pushed to https://huggingface.co/org/name\n"
    assert hub.repositories == {"org/name": True}
    assert hub.files.keys() == NAMES
    assert not Path(hub.folder).exists()
    assert_no_local_path(hub.files, untrained)
    notes = json.loads(hub.files["loraplus.json"])
    assert (notes["settings"]["model"]["path"], notes["settings"]["data"]["path"]) == (
        "org/base",
        "texts.csv",
    )
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert huggingface_hub.ModelCard(hub.files["README.md"].decode()).data.base_model == "org/base"


@pytest.mark.slow
def test_a_merged_model_is_pushed_and_kept(untrained, hub, capsys, tmp_path):
    to = tmp_path / "merged"
    options = ("--merged", "--to", to, "--push", "org/name", "--public", *BASE)
    printed(capsys, "export", untrained.out, *options)
    assert hub.repositories == {"org/name": False}
    assert hub.files == {path.name: path.read_bytes() for path in to.iterdir()}
    assert_no_local_path(hub.files, untrained)


@pytest.mark.slow
def test_a_failed_upload_is_one_line_without_the_token_and_keeps_the_export(untrained, hub, capsys, tmp_path):
    hub.error = ConnectionError(f"Illegal header value b'Bearer {TOKEN}'\nno route")
    to = tmp_path / "to"
    line = rejected(capsys, "export", untrained.out, "--to", to, "--push", "org/name", *BASE)
    assert_mentions(line, "org/name", "no route", "***", f"hf upload org/name {to}")
    assert TOKEN not in line
    assert {path.name for path in to.iterdir()} == NAMES
    assert "hf upload" not in rejected(capsys, "export", untrained.out, "--push", "org/name", *BASE)


@pytest.mark.slow
def test_what_cannot_be_pushed_is_known_before_anything_is_written(
    untrained, hub, capsys, tmp_path, monkeypatch
):
    to, run = tmp_path / "to", ("export", untrained.out)
    for options, words in (
        (("--push", "name", *BASE), ("--push", "ORG/NAME", "'name'")),
        (("--push", "org/a b", *BASE), ("--push", "ORG/NAME", "'org/a b'")),
        (("--push", "org/name", "--to", to), ("--base_model", untrained.model)),
        (("--push", "org/name", "--to", to, "--base_model", "minilm"), ("--base_model", "'minilm'")),
    ):
        assert_mentions(rejected(capsys, *run, *options), *words)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert_mentions(
        rejected(capsys, *run, "--push", "org/name", "--to", to, *BASE), "hf auth login", "HF_TOKEN"
    )
    assert not hub.repositories
    assert not to.exists()


@pytest.mark.slow
def test_a_push_replaces_an_earlier_export_and_nothing_else(untrained, hub, capsys, tmp_path):
    to, run = tmp_path / "to", ("export", untrained.out, "--push", "org/name", *BASE)
    hub.files = {"README.md": b"license: mit"}
    printed(capsys, *run)
    adapter = hub.files
    assert adapter.keys() == NAMES
    hub.files = {"loraplus.json": b"", "config.json": b"", "model-00001-of-00002.safetensors": b""}
    printed(capsys, *run)
    assert hub.files == adapter
    for files in (
        {"config.json": b"", "model.safetensors": b""},
        {**adapter, "LICENSE": b"", "b/model.py": b""},
    ):
        hub.files = files
        line = rejected(capsys, *run, "--to", to)
        assert_mentions(line, "org/name", "choose another name", *(files.keys() - adapter.keys()))
        assert hub.files == files
    assert not to.exists()


SLOW_UPLOAD = """
import sys, time
import huggingface_hub
from loraplus_jax.cli import __main__ as loraplus_command
from tests.inference.test_push import TOKEN, Hub

class SlowHub(Hub):
    def upload_folder(self, *, folder_path, **options):
        print(folder_path, flush=True)
        time.sleep(999)

huggingface_hub.HfApi, huggingface_hub.get_token = SlowHub(), lambda: TOKEN
loraplus_command.run()
"""


@pytest.mark.slow
def test_a_signal_during_an_upload_leaves_nothing(untrained, tmp_path):
    options = ("export", str(untrained.out), "--push", "org/name", *BASE)
    with started(sys.executable, "-c", SLOW_UPLOAD, *options, TMPDIR=str(tmp_path)) as process:
        folder = Path(process.stdout.readline().strip())
        assert (folder / "README.md").exists()
        assert tmp_path in folder.parents
        process.send_signal(signal.SIGTERM)
        ending, _, stderr = ended(process)
    assert (ending, stderr.count("\n")) == (143, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("public", "flags"), [(True, ()), (False, ("--public",))])
def test_a_repository_of_the_other_visibility_is_rejected(untrained, hub, capsys, tmp_path, public, flags):
    hub.repositories = {"org/name": not public}
    to = tmp_path / "to"
    line = rejected(capsys, "export", untrained.out, "--to", to, "--push", "org/name", *BASE, *flags)
    assert_mentions(line, "org/name", "is public" if public else "is private", "--public", "another name")
    assert not hub.files
    assert not to.exists()


@pytest.mark.slow
def test_a_repository_that_cannot_be_opened_is_known_before_the_export(
    untrained, hub, capsys, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise ConnectionError(f"offline, Bearer {TOKEN}")

    monkeypatch.setattr(hub, "create_repo", refuse)
    to = tmp_path / "to"
    line = rejected(capsys, "export", untrained.out, "--to", to, "--push", "org/name", *BASE)
    assert_mentions(line, "org/name", "offline", "***")
    assert not to.exists()


@pytest.mark.slow
def test_a_base_named_as_a_directory_here(untrained, hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "org/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    printed(capsys, "export", untrained.out, "--push", "org/name", *BASE)
    assert huggingface_hub.ModelCard(hub.files["README.md"].decode()).data.base_model == "org/base"
    with pytest.raises(ValueError, match=r"org/base.*--base_model"):
        push.hub_base(None, "org/base")


def test_settings_without_local_directories():
    data = {
        "path": None,
        "root": "/home/me/glue",
        "train": ["~/a.csv", "org/set/b.csv"],
        "template": "../t.jinja",
    }
    settings = {
        "model": {"path": "/m", "dtype": "float32"},
        "data": data,
        "init_adapter": "/runs/x",
        "seed": 1,
    }
    assert public_settings(settings, "org/base") == {
        "model": {"path": "org/base", "dtype": "float32"},
        "data": {"path": None, "root": "glue", "train": ["a.csv", "org/set/b.csv"], "template": "t.jinja"},
        "init_adapter": "x",
        "distributed": {},
        "seed": 1,
    }
    assert push.hub_base(None, "org/base") == "org/base"
