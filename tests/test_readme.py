"""The README's Python runs as it stands, and its commands name what exists."""

import contextlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from loraplus_jax.cli.commands import COMMANDS
from loraplus_jax.cli.parser import parse
from loraplus_jax.settings.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_readme_has_python():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run_and_train(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert float(names["loss"](names["lora"])) < float(
        names["loss"](names["init_lora"](names["model"], names["jax"].random.key(1), names["x"])[0])
    )


def test_names_in_the_table_are_public():
    import loraplus_jax

    table = README[README.index("| you want | use |") : README.index("[examples/]")]
    names = re.findall(r"`(\w+)`|`(\w+)\(", table)
    assert len(names) >= 10
    known = {"nn"}
    for name in {a or b for a, b in names} - known:
        assert hasattr(loraplus_jax, name) or name == "optax", name


def test_files_that_are_named_exist():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    files = re.findall(r"(configs/\w+\.yaml|benchmarks/\w+\.py)", README)
    assert links
    assert files
    for target in links + files:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The words of each `loraplus` line in the page's blocks, without what a shell does with the output."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if command := re.match(r"\s*(?:\.venv/bin/)?loraplus (.+)", line):
            words = shlex.split(command[1], comments=True)
            yield [*itertools.takewhile(lambda word: word not in ("|", ">", "&&", "&"), words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_valid_options_and_settings(page, capsys):
    """Each line gets as far as its work, with a recipe in place of a config of the reader."""
    for words in commands(page):
        chosen = "smollm2_chat" if "chat" in " ".join(words) else "quickstart"
        is_readers = "config" in COMMANDS[words[0]].arguments and words[1] not in RECIPES
        with contextlib.suppress(SystemExit):  # --help
            parse(COMMANDS, [words[0], chosen, *words[2:]] if is_readers and words[1][0] != "-" else words)


def test_many_commands_are_seen():
    assert sum(len(list(commands(page))) for page in PAGES) > 60


@pytest.mark.parametrize("words", ["train quickstart --lora.rnk 3", "predict DIR --txt a"])
def test_a_wrong_option_is_seen(words):
    with pytest.raises(ValueError, match=words.split()[2]):
        parse(COMMANDS, words.split())
