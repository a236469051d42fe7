"""Four thousand damaged config files, YAML that no config needs among them."""

from pathlib import Path

import pytest
import yaml

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings

from .damage import check, damaged, data_limit, words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / "configs/quickstart.yaml").read_bytes()
LAUGHS = "[&a [x, x, x, x, x, x, x, x, x], " + ", ".join(
    f"&{chr(n + 1)} [{', '.join(['*' + chr(n)] * 9)}]" for n in range(ord("a"), ord("a") + 9)
)
ODD = (
    "",
    *words("~ true on '' x .. é😀 -1 0 3 2.5 1e3 .inf .nan 1e400 -1e-400 0x 0b_ 0o9 1:2:3 1_0 5e-4"),
    *('"\\ud800"', '"\\0"'),
    *("9" * 30, "9" * 400, "9" * 5000, "2001-01-01", "2001-99-99", "2001-01-01 25:00:00"),
    *("0001-01-01 00:00:00 +23:59", "=", "<<: x", "|\n   x", "null\nmore: 1", "1\n---\nmodel: 2", "\tx"),
    *words(
        "[] | {} | [x, 1] | {a: b} | {[a]: b} | {{a: b}: c} | [null] | [[x]] | {1: 2, 1: 3} | {<<: {a: 1}}",
        " | ",
    ),
    *words(
        "!!int '' | !!int x | !!float x | !!bool x | !!null x | !!timestamp x | !!binary é | !!set [a]", " | "
    ),
    *words(
        "!!omap x | !!pairs [a] | !!str [a] | !!python/name:os.system | !!python/object/apply:os.mkdir [made]",
        " | ",
    ),
    *words(
        "!<tag:yaml.org,2002:python/module:os> x | !x y | *gone | &a [*a] | &a {x: *a} | %x | @ | `", " | "
    ),
    *(LAUGHS + "]", "# x", "x # y", "'x", '"x', "x: y: z", "- x\n" * 500, "x" * 20_000),
    *("[" * n + "]" * n for n in (50, 90, 150, 300, 3000)),
    *("{a: " * n + "1" + "}" * n for n in (50, 90, 150, 300)),
)
KEYS = words(
    "1 | true | null | 2001-01-01 | 1.5 | ~ | '' | [a] | {a: b} | << | model | lora | *a | &a b | ? x | é",
    " | ",
)


def every_field():
    """A config with each field of each section."""
    settings = Settings(model=ModelSettings(path="m"), data=DataSettings(path="d"), output_dir="out")
    content = settings.to_json()
    base = yaml.safe_load(QUICKSTART)
    return {
        **content,
        **{
            key: {**content[key], **value} if isinstance(value, dict) else value
            for key, value in base.items()
        },
    }


def odd_config(rng, lines):
    """One line's value, key or indent replaced by something else, or a line too many or too few."""
    lines = list(lines)
    at = rng.randrange(len(lines))
    name, _, value = lines[at].partition(":")
    indent = name[: len(name) - len(name.lstrip())]
    what = rng.choice(("value", "value", "value", "value", "key", "more", "gone", "twice"))
    if what == "value":
        lines[at] = f"{name}: {rng.choice(ODD)}"
    elif what == "key":
        lines[at] = f"{indent}{rng.choice(KEYS)}:{value}"
    elif what == "more":
        lines.insert(at, f"{indent}{rng.choice(KEYS)}: {rng.choice(ODD)}")
    elif what == "twice":
        lines.insert(at, lines[at])
    else:
        del lines[at]
    return "\n".join(lines).encode()


def test_a_damaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    lines = [
        [line for line in QUICKSTART.decode().splitlines() if not line.startswith("#")],
        yaml.safe_dump(every_field()).splitlines(),
    ]

    def make(rng):
        content = odd_config(rng, rng.choice(lines)) if rng.randrange(4) else damaged(rng, QUICKSTART)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return content

    def read():
        assert isinstance(parse_settings(path), Settings)

    check(4000, make, read, limit=data_limit)
    assert {p.name for p in tmp_path.iterdir()} == {path.name}, "a tag of Python's own was obeyed"
