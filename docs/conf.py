"""The site: the pages of this folder, and a reference that is generated from the package itself."""

import importlib
import inspect
import json
import pkgutil
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from error_index import Index  # noqa: E402, needs the path

project = "loraplus_jax"
author = "the loraplus_jax authors"
extensions = [
    "myst_nb",
    "notebook_pages",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "sphinx_book_theme"
html_title = "LoRA+ for JAX and Flax"
html_theme_options = {
    "show_toc_level": 2,
    "max_navbar_depth": 1,  # not every symbol of the API
    "navbar_persistent": [],  # the sidebar has a search field
    "use_download_button": False,
    "use_fullscreen_button": False,
}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "auto"  # the notebooks; tests/test_docs.py runs the blocks of the other pages
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # warnings, which name files of this machine
autosummary_generate = True
autosummary_ignore_module_all = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False

PUBLIC = ("quantization", "adapter", "optim", "inits", "linen", "nnx", "step", "interop")
"""The folders whose modules are the public API; the rest is the application."""


def public_modules() -> list[str]:
    """Dotted names of the public modules."""
    package = importlib.import_module("loraplus_jax")
    names = []
    for folder in PUBLIC:
        path = Path(package.__file__).parent / folder
        prefix = f"loraplus_jax.{folder}."
        modules = [
            m.name for m in pkgutil.iter_modules([str(path)]) if not m.ispkg and not m.name.startswith("_")
        ]
        names += [prefix + name for name in modules]
    return names


def public_names(module: str) -> list[str]:
    """Functions and classes that a module defines, in order."""
    loaded = importlib.import_module(module)
    own = [(n, x) for n, x in vars(loaded).items() if inspect.isclass(x) or inspect.isfunction(x)]
    return [n for n, x in own if not n.startswith("_") and x.__module__ == module]


def write_api(directory: Path) -> None:
    """Every public symbol by autosummary, and the names at the package's root."""
    import loraplus_jax

    lines = ["# API", "", "`from loraplus_jax import ...` gives:", ""]
    names = loraplus_jax.__all__
    lines += [", ".join(f"{{py:obj}}`~{getattr(loraplus_jax, n).__module__}.{n}`" for n in names), ""]
    for module in public_modules():
        summary = (importlib.import_module(module).__doc__ or "").strip().splitlines()[0]
        names = public_names(module)
        if not names:
            continue
        lines += [f"## {module}", "", summary, "", "```{eval-rst}", f".. currentmodule:: {module}", ""]
        lines += [
            ".. autosummary::",
            "   :toctree: generated",
            "",
            *(f"   {name}" for name in names),
            "```",
            "",
        ]
    (directory / "api.md").write_text("\n".join(lines) + "\n")


def write_settings(directory: Path) -> None:
    """Every setting of the command line, from the schema."""
    from loraplus_jax.settings.parsing import describe_type, setting_fields
    from loraplus_jax.sweep.settings import SweepRun

    lines = ["# Settings", "", "Each is a key of the YAML file and an option `--section.field VALUE`.", ""]
    section = None
    for field in setting_fields(SweepRun):
        first = field.name.partition(".")[0] if "." in field.name else "run"
        if first != section:
            section = first
            lines += [
                "",
                f"## {section}",
                "",
                "| setting | takes | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
        cells = (
            f"`{field.name}`",
            describe_type(field.type),
            "required" if field.required else f"`{json.dumps(field.default)}`",
            field.text,
        )
        lines.append(_format_row(*cells))
    (directory / "settings.md").write_text("\n".join(lines) + "\n")


def _format_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_commands(directory: Path) -> None:
    """Every command with its arguments, from the table of the command line."""
    from loraplus_jax.cli.commands import COMMANDS

    lines = ["# Commands", ""]
    for name, command in COMMANDS.items():
        lines += [f"## loraplus {name}", "", f"{command.text[0].upper()}{command.text[1:]}.", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        for argument, more in command.arguments.items():
            words = [argument] if argument.startswith("-") else []
            words += [more["metavar"]] if "metavar" in more else []
            text = more["help"] + (" (required)" if more.get("required") else "")
            lines.append(_format_row(f"`{' '.join(words)}`", text))
        lines += ["", "[Settings](settings.md) lists its settings.", ""] if command.settings else [""]
    (directory / "commands.md").write_text("\n".join(lines) + "\n")


def write_errors(directory: Path) -> None:
    """The messages of all errors, by module, from the source."""
    package = HERE.parent / "loraplus_jax"
    lines = [
        "# Error index",
        "",
        "Every message that the package raises, and the parts of those it joins; `{...}` stands for a value.",
        "[Runs](../runs.md) says what to do about damaged checkpoints and runs that stop early.",
        "",
    ]
    for path, messages in Index(package).messages.items():
        name = path.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
        lines += [f"## {name}", "", "| error | message |", "| --- | --- |"]
        lines += [f"| {errors} | {_escape(text)} |" for errors, text in messages] + [""]
    (directory / "errors.md").write_text("\n".join(lines) + "\n")


def _escape(text: str) -> str:
    for sign in "\\`*_|<>[]{}$~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def generate(directory: Path = HERE / "reference") -> None:
    """Writes the generated pages anew: a page of a name that is gone would stay."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for write in (write_api, write_commands, write_settings, write_errors):
        write(directory)
    (directory / "changelog.md").write_text("```{include} ../../CHANGELOG.md\n```\n")


def setup(app: object) -> None:
    """Called by Sphinx."""
    generate()
