"""The documentation: python blocks run, pages and links exist, the reference names every public symbol."""

import importlib.util
import inspect
import re
import types

import pytest

from .pages import DOCS, assert_printed, blocks, run

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
PAGES = sorted(DOCS.glob("*.md")) + NOTEBOOKS
PUBLIC = ("adapter", "functions", "inits", "interop", "linen", "nnx", "optim", "quantization", "step")
"""The packages whose functions users call; the rest is the application."""
OTHER_LINES = "using 2 of 16 GPUs, out of memory, is not installed; run pip install 'loraplus_jax[train]'"
"""What commands print beside errors; other tests pin it."""
ELSEWHERE = {"vision"}  # tests/others has the packages that this page needs
TABS = [
    pytest.param(page.stem, tab, id=f"{page.stem} {tab}".strip())
    for page in PAGES
    if page not in NOTEBOOKS
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


@pytest.fixture(scope="module")
def messages(conf):
    return conf.Index(DOCS.parent / "loraplus_jax").messages


@pytest.mark.slow
@pytest.mark.parametrize(("page", "tab"), TABS)
def test_the_blocks_of_a_page_run_from_top_to_bottom_and_print_what_it_shows(
    page, tab, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run(page, tab)
    printed = capsys.readouterr().out
    for shown in blocks(page, "text").get(tab, ()):
        assert_printed(shown, printed)


def test_pages_that_include_an_example_show_its_code():
    included = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, start in re.findall(r"```{literalinclude} (\S+)\n:start-at: (.+)\n", text):
            code = (page.parent / name).read_text(encoding="utf-8")
            assert code.count(start) == 1, (page.name, name)
            included += 1
    assert included


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
            is_generated = target.startswith("reference/")  # which Sphinx checks
            assert is_generated or (page.parent / target).exists(), f"{page.name}: {target}"


def test_notebooks_are_executed_and_draw_the_gallery():
    drawn = {"memory"}  # by notebook_pages itself
    for page in NOTEBOOKS:
        text = page.read_text(encoding="utf-8")
        assert re.match(r"---\n.*?format_name: myst\n.*?\n---\n\n# ", text, flags=re.S), page.name
        assert "```python" not in text, page.name
        drawn |= set(re.findall(r"^:tags: \[gallery-(\w+)\]$", text, flags=re.M))
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r'<img src="gallery/(\w+)\.png" alt=".+">', index)) == drawn
    assert len(drawn) == 3


COLAB = "](https://colab.research.google.com/github/me/fork/blob/gh-pages/notebooks/sweep.ipynb)"
INSTALL = '%pip install -q "loraplus_jax[train] @ git+https://github.com/me/fork"'
OPENED = [("", '<a href="sweep.ipynb" download>', "raise ImportError("), ("me/fork", COLAB, INSTALL)]


@pytest.mark.parametrize(("repository", "link", "command"), OPENED)
def test_a_notebook_says_how_to_open_it_and_installs_the_package(
    conf, monkeypatch, repository, link, command
):
    import notebook_pages  # conf puts its folder on the path

    monkeypatch.setattr(notebook_pages, "REPOSITORY", repository)
    source, other = ["---\nkernelspec:\n---\n\n# Title\n\n```{code-cell}\n# A comment\n```\n"], ["# Title\n"]
    notebook_pages.add_how_to_open(None, "notebooks/sweep", source)
    notebook_pages.add_how_to_open(None, "nnx", other)
    assert other == ["# Title\n"]
    first, _, rest = source[0].partition("# Title\n\n")[2].partition("```\n\n")
    assert link in first
    assert f"\n    {command}" in first
    assert rest == "```{code-cell}\n# A comment\n```\n"


def test_pictures_are_taken_from_tagged_cells(conf):
    import notebook_pages

    outputs = [{"name": "stdout", "text": ""}, {"data": {"image/png": "aGVsbG8="}}]
    cells = [
        {"metadata": {}, "outputs": outputs},
        {"metadata": {"tags": ["remove-input", "gallery-map"]}, "outputs": outputs},
    ]
    assert list(notebook_pages.tagged_pictures({"cells": cells})) == [("map", b"hello")]


def test_the_api_page_has_every_public_name_once():
    named = re.findall(r"^   (loraplus_jax\.[\w.]+)$", (DOCS / "api.md").read_text(), flags=re.M)
    places = [name.rpartition(".") for name in named if "lm_eval" not in name]  # it needs an extra
    listed = [getattr(importlib.import_module(module), name) for module, _, name in places]
    for package in ("", *PUBLIC):
        module = importlib.import_module(f"loraplus_jax.{package}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert sum(value is x for x in listed) == 1, f"{package}.{name}"


@pytest.mark.slow
def test_the_reference_has_every_setting_and_error(conf, messages, tmp_path, monkeypatch):
    monkeypatch.setattr(conf, "Index", lambda package: types.SimpleNamespace(messages=messages))
    tmp_path = tmp_path / "reference"
    conf.generate(tmp_path)
    commands = (tmp_path / "commands.md").read_text()
    assert "## loraplus sweep" in commands
    assert "| `--dtype float32\\|bfloat16` |" in commands
    settings = (tmp_path / "settings.md").read_text()
    assert "| `lora.lr_ratio` |" in settings
    assert "| `sweep.lr_ratios` |" in settings
    pages = [(tmp_path / f"errors/{section}.md").read_text() for section in conf.ERRORS]
    assert sum(page.count("\n| ") - 2 for page in pages) == sum(map(len, messages.values()))


@pytest.mark.slow
def test_the_index_has_messages_of_every_form(messages):
    # In the raise itself; in a variable; returned by a helper; passed to one; in a list of problems.
    texts = [text for found in messages.values() for row in found for text in [" ".join(row)]]
    assert len(texts) > 700
    for start in (
        "FileNotFoundError no checkpoint{...} in {...}",
        "DamagedCheckpoint the arrays or the metadata have changed since they were saved",
        "ValueError distributed.coordinator is {...}, but the environment does not describe ",
        "ValueError {...}: cannot convert the adapter to PEFT",
        "ValueError column {...} appears twice",
    ):
        assert any(text.startswith(start) for text in texts), start
    assert not any("JSON FILE" in text or "Apache-2.0, sentence" in text for text in texts)  # help


@pytest.mark.slow
def test_troubleshooting_has_every_message_in_one_section(conf, messages, tmp_path):
    page = (DOCS / "troubleshooting.md").read_text()
    folders = [folder for section in conf.ERRORS.values() for folder in section]
    package = DOCS.parent / "loraplus_jax"
    assert {path.relative_to(package).parts[0] for path in messages} == set(folders)
    assert len(folders) == len(set(folders))
    for section in conf.ERRORS:
        assert f"{{include}} reference/errors/{section}.md" in page


@pytest.mark.slow
def test_messages_that_troubleshooting_quotes_exist(messages):
    page = (DOCS / "troubleshooting.md").read_text()
    known = "\n".join(text for found in messages.values() for _, text in found) + OTHER_LINES
    cells = re.findall(r"^\| (`[^|]*?) \|", page, flags=re.M)
    assert len(cells) > 30
    for cell in cells:
        for quoted in re.findall(r"`([^`]+)`", cell):
            for part in re.split(r" ?\.\.\. ?", quoted):
                assert part.strip(" :") in known, part


def test_files_and_calls_that_contributing_names_exist():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", text):
        assert (root / "loraplus_jax" / name).exists() or (root / name).exists(), name
    steps = re.findall(r"(\w+/\w+\.py) +(\w+)", text.partition("## The path of a batch")[2])
    assert len(steps) > 5
    for name, call in steps:
        source = (root / "loraplus_jax" / name).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {call}\b", source, flags=re.M), (name, call)


def test_every_public_function_says_what_it_returns():
    names = re.findall(r"^ +(loraplus_jax[\w.]*)\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert len(names) > 100
    silent = []
    for module, name in names:
        if module.partition(".")[2].split(".")[0] not in ("", *PUBLIC):  # it may need an extra
            continue
        if inspect.isfunction(public := getattr(importlib.import_module(module), name)):
            returns = inspect.signature(public).return_annotation
            if returns and not re.search(r"^ *(Returns|Yields):$", public.__doc__ or "", flags=re.M):
                silent.append(f"{module}.{name}")
    assert not silent
