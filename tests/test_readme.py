"""The README's Python runs as it stands, and its commands name what exists."""

import contextlib
import re
from pathlib import Path

import pytest

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


def test_commands_parse(capsys):
    """Each `loraplus` line of the README gets as far as its work."""
    from loraplus_jax.cli.commands import COMMANDS
    from loraplus_jax.cli.parser import make_parser

    lines = re.findall(r"^\.venv/bin/loraplus (.+?)(?:\s+#.*)?$", README, flags=re.M)
    assert len(lines) >= 5
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line)
        with contextlib.suppress(SystemExit):  # --help
            assert make_parser(COMMANDS).parse_known_args([w.strip('"') for w in words])
