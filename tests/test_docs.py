"""The documentation: python blocks run, pages and links exist, the reference names every public symbol."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
PAGES = sorted(DOCS.glob("*.md")) + NOTEBOOKS


def variants(text):
    """A page as its reader sees it with each of its tabs, by the tab's name."""
    names = sorted(set(re.findall(r"^:::{tab-item} (\w+)$", text, flags=re.M)))
    others = r"^:::{{tab-item}} (?!{}$).*?^:::$"
    return {name: re.sub(others.format(name), "", text, flags=re.M | re.S) for name in names} or {"": text}


BLOCKS = {
    f"{page.stem} {name}".strip(): blocks
    for page in PAGES
    for name, text in variants(page.read_text(encoding="utf-8")).items()
    if (blocks := re.findall(r"```python\n(.*?)```", text, flags=re.S))
}


@pytest.fixture(scope="module")
def conf():
    """Sphinx's configuration, which also writes the reference."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("page", BLOCKS)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, code in enumerate(BLOCKS[page]):
        exec(compile(code, f"{page}.md, block {number}", "exec"), names)


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {
        line for block in re.findall(r"```{toctree}(.*?)```", index, flags=re.S) for line in block.split()
    }
    names = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert names - {"index"} <= listed


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_notebooks_are_executed_and_draw_the_gallery():
    drawn = {"memory"}  # by notebook_pages itself
    for page in NOTEBOOKS:
        text = page.read_text(encoding="utf-8")
        assert re.match(r"---\n.*?format_name: myst\n.*?\n---\n\n# ", text, flags=re.S), page.name
        assert "```python" not in text, page.name
        drawn |= set(re.findall(r"^:tags: \[gallery-(\w+)\]$", text, flags=re.M))
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r'<img src="gallery/(\w+)\.png" alt=".+">', index)) == drawn
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("repository", "link", "command"),
    [
        ("", '<a href="nnx_model.ipynb" download>', "raise ImportError("),
        (
            "me/fork",
            "](https://colab.research.google.com/github/me/fork/blob/gh-pages/notebooks/nnx_model.ipynb)",
            '%pip install -q "loraplus_jax[train] @ git+https://github.com/me/fork"',
        ),
    ],
)
def test_a_notebook_says_how_to_open_it_and_installs_the_package(
    conf, monkeypatch, repository, link, command
):
    import notebook_pages  # conf puts its folder on the path

    monkeypatch.setattr(notebook_pages, "REPOSITORY", repository)
    source = ["---\nkernelspec:\n---\n\n# Title\n\n```{code-cell}\n# A comment\n```\n"]
    notebook_pages.add_how_to_open(None, "notebooks/nnx_model", source)
    first, _, rest = source[0].partition("# Title\n\n")[2].partition("```\n\n")
    assert link in first
    assert "```{code-cell}\n:tags: [remove-cell]\n\nimport importlib.util\n" in first
    assert f"\n    {command}" in first
    assert rest == "```{code-cell}\n# A comment\n```\n"
    other = ["# Title\n"]
    notebook_pages.add_how_to_open(None, "nnx", other)
    assert other == ["# Title\n"]


def test_pictures_are_taken_from_tagged_cells(conf):
    import notebook_pages

    outputs = [{"name": "stdout", "text": ""}, {"data": {"image/png": "aGVsbG8="}}]
    cells = [
        {"metadata": {}, "outputs": outputs},
        {"metadata": {"tags": ["remove-input", "gallery-map"]}, "outputs": outputs},
    ]
    assert list(notebook_pages.tagged_pictures({"cells": cells})) == [("map", b"hello")]


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
