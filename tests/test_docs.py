"""The documentation: python blocks run, pages and links exist, the reference names every public symbol."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from .pages import DOCS, blocks, run

PAGES = sorted(DOCS.glob("*.md"))
ELSEWHERE = {"vision", "tunix"}  # tests/others has the packages that these pages need
TABS = [
    pytest.param(page.stem, tab, id=f"{page.stem} {tab}".strip())
    for page in PAGES
    for tab, code in blocks(page.stem).items()
    if code and page.stem not in ELSEWHERE
]


@pytest.fixture(scope="module")
def conf():
    """Sphinx's configuration, which also writes the reference."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("page", "tab"), TABS)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, tab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, tab)


def test_the_page_on_tunix_is_the_example_that_tests_others_runs():
    example = (DOCS.parent / "examples/08_tunix.py").read_text(encoding="utf-8")
    code = "\n\n".join(blocks("tunix")[""])
    assert code == example[example.index("import ") : example.index("\n\nif __name__")]


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {
        line for block in re.findall(r"```{toctree}(.*?)```", index, flags=re.S) for line in block.split()
    }
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


def test_the_reference_has_every_public_symbol_setting_and_error(conf, tmp_path):
    tmp_path = tmp_path / "reference"
    conf.generate(tmp_path)
    api = (tmp_path / "api.md").read_text()
    import loraplus_jax

    for name in loraplus_jax.__all__:
        assert re.search(rf"\.{name}`", api), name
    modules = conf.public_modules()
    package = Path(loraplus_jax.__file__).parent
    folders = [package / folder for folder in conf.PUBLIC]
    files = [f for folder in folders for f in folder.glob("*.py") if not f.name.startswith("_")]
    assert len(modules) == len(files)
    for module in modules:
        for name in conf.public_names(module):
            assert f"   {name}\n" in api, f"{module}.{name}"
    commands = (tmp_path / "commands.md").read_text()
    assert "## loraplus sweep" in commands
    assert "| `--dtype float32\\|bfloat16` |" in commands
    settings = (tmp_path / "settings.md").read_text()
    assert "| `lora.lr_ratio` |" in settings
    assert "| `sweep.lr_ratios` |" in settings
    errors = (tmp_path / "errors.md").read_text().splitlines()
    assert len(errors) > 700
    # In the raise itself; in a variable; returned by a helper; passed to one; in a list of problems.
    for row in (
        "| FileNotFoundError | no checkpoint\\{...\\} in \\{...\\} |",
        "| DamagedCheckpoint | the arrays or the metadata have changed since they were saved |",
        "| ValueError | distributed.coordinator is \\{...\\}, but the environment does not describe ",
        "| ValueError | \\{...\\}: cannot convert the adapter to PEFT |",
        "| ValueError | column \\{...\\} appears twice |",
    ):
        assert any(line.startswith(row) for line in errors), row


def test_files_and_calls_that_contributing_names_exist():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", text):
        assert (root / "loraplus_jax" / name).exists() or (root / name).exists(), name
    steps = re.findall(r"^\| \d+ \| `([^`]+)` \| `(\w+)` ", text, flags=re.M)
    assert len(steps) > 10
    for name, call in steps:
        source = (root / "loraplus_jax" / name).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {call}\b", source, flags=re.M), (name, call)


def test_every_public_function_says_what_it_returns(conf):
    silent = []
    for module in conf.public_modules():
        for name in conf.public_names(module):
            function = getattr(importlib.import_module(module), name)
            returns = inspect.isfunction(function) and inspect.signature(function).return_annotation
            if returns and not re.search(r"^ *(Returns|Yields):$", function.__doc__ or "", flags=re.M):
                silent.append(f"{module}.{name}")
    assert not silent
