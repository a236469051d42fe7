"""The site: the pages of this folder, and a reference that is generated from the package itself."""

import json
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from error_index import Index  # noqa: E402, needs the path
from notebook_pages import REPOSITORY  # noqa: E402

project = "loraplus_jax"
author = "the loraplus_jax authors"
extensions = [
    "myst_nb",
    "notebook_pages",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_llms_txt",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "LoRA+ for JAX and Flax"
html_theme_options = {
    "show_toc_level": 2,
    "max_navbar_depth": 1,  # not every symbol of the API
    "navbar_persistent": [],  # the sidebar has a search field
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": f"https://github.com/{REPOSITORY}",
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_edit_page_button": True,
    }
exclude_patterns = ["_build", "reference/errors"]
templates_path = ["_templates"]
llms_txt_full_file = False  # the sources of the pages stand beside them in _sources
llms_txt_uri_template = "_sources/{docname}{suffix}{sourcelink_suffix}"
llms_txt_exclude = ["reference/generated/*"]
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
autodoc_mock_imports = ["lm_eval"]  # of an extra
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # `members` lists the attributes
default_role = "py:obj"  # a link where the name is public, else code
maximum_signature_line_length = 80


def reachable(inventories: dict[str, str]) -> dict[str, tuple[str, None]]:
    """The inventories that answer: without a network the site is built without links into them."""
    found = {}
    for name, address in inventories.items():
        try:
            urllib.request.urlopen(f"{address}objects.inv", timeout=5).close()
            found[name] = (address, None)
        except OSError:
            print(f"no links into the documentation of {name}: {address} does not answer")
    return found


intersphinx_mapping = reachable(
    {
        "python": "https://docs.python.org/3/",
        "jax": "https://docs.jax.dev/en/latest/",
        "flax": "https://flax.readthedocs.io/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "orbax": "https://orbax.readthedocs.io/en/latest/",
    }
)


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
            lines += ["", f"## {section}", "", "| setting | takes | meaning |", "| --- | --- | --- |"]
        default = "required" if field.required else f"default `{json.dumps(field.default)}`"
        lines.append(_format_row(f"`{field.name}`", f"{describe_type(field.type)}; {default}", field.text))
    (directory / "settings.md").write_text("\n".join(lines) + "\n")


def _format_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_commands(directory: Path) -> None:
    """Every command with its arguments, from the table of the command line."""
    from loraplus_jax.cli.commands import COMMANDS
    from loraplus_jax.cli.parser import describe, load
    from loraplus_jax.settings.parsing import setting_fields

    lines = ["# Commands", ""]
    for name, command in COMMANDS.items():
        lines += [f"## loraplus {name}", "", f"{command.text[0].upper()}{command.text[1:]}.", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        for argument, more in command.arguments.items():
            words = [argument] if argument.startswith("-") else []
            words += [more["metavar"]] if "metavar" in more else []
            text = describe(more) + (" (required)" if more.get("required") else "")
            lines.append(_format_row(f"`{' '.join(words)}`", text))
        has_config = "config" in command.arguments
        for field in setting_fields(load(command.settings)) if command.settings and not has_config else ():
            lines.append(_format_row(f"`--{field.name}`", field.text))
        lines += ["", "[Settings](settings.md) lists its settings.", ""] if has_config else [""]
    (directory / "commands.md").write_text("\n".join(lines) + "\n")


def write_examples(directory: Path) -> None:
    """The example scripts, each of which begins with what it shows."""
    lines = [
        "# Examples",
        "",
        "Whole scripts, each run by the tests. They use small models with random weights and need no",
    ]
    lines += ["download, except for the libraries that they name.", ""]
    for path in sorted((HERE.parent / "examples").glob("*.py")):
        lines += [f"## {path.stem}", "", f"```{{literalinclude}} ../../examples/{path.name}", "```", ""]
    (directory / "examples.md").write_text("\n".join(lines))


ERRORS = {
    "runs": ("training", "tasks", "_utils"),
    "settings": ("settings", "cli"),
    "data": ("data",),
    "models": ("models",),
    "adapters": ("adapter", "functions.py", "linen", "nnx", "interpreter", "quantization"),
    "optimizers": ("optim", "inits"),
    "steps": ("step",),
    "files": ("interop",),
    "inference": ("inference",),
    "sweeps": ("sweep",),
    "plans": ("plan",),
}
"""The folders of the package whose messages stand in each section of troubleshooting.md."""


def write_errors(directory: Path) -> None:
    """The messages of all errors from the source, one file a section of the page."""
    package = HERE.parent / "loraplus_jax"
    messages = Index(package).messages
    (directory / "errors").mkdir()
    for section, folders in ERRORS.items():
        lines = [":::{dropdown} All messages", "", "| message | error | raised in |", "| --- | --- | --- |"]
        for path, found in messages.items():
            name = path.relative_to(package)
            if name.parts[0] in folders:
                lines += [f"| {_escape(text)} | {errors} | `{name}` |" for errors, text in found]
        (directory / "errors" / f"{section}.md").write_text("\n".join([*lines, ":::"]) + "\n")


def _escape(text: str) -> str:
    for sign in "\\`*_|<>[]{}$~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def generate(directory: Path = HERE / "reference") -> None:
    """Writes the generated pages anew: a page of a name that is gone would stay."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for write in (write_commands, write_settings, write_examples, write_errors):
        write(directory)
    for name in ("changelog", "contributing"):
        (directory / f"{name}.md").write_text(f"```{{include}} ../../{name.upper()}.md\n```\n")


ARRAY = "~jax.Array | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex"
TYPES = {
    "~jax.jaxlib._jax.Array": "~jax.Array",
    ARRAY: "~jax.typing.ArrayLike",
    "~collections.abc.Callable[[~jax.typing.ArrayLike], ~jax.typing.ArrayLike]": "~optax.Schedule",
}
"""The public names of types in signatures, applied in order."""


def name_types(app: object, what: str, name: str, thing: object, options: object, *signature: Any) -> Any:
    """A signature with the names of `TYPES`; a default without a literal becomes `...`."""
    signature = tuple(text and re.sub(r" = <.*?>(?=[,)])", " = ...", text) for text in signature)
    for long, short in TYPES.items():
        signature = tuple(text and text.replace(long, short) for text in signature)
    return signature


def setup(app: Any) -> None:
    """Called by Sphinx."""
    generate()
    app.connect("autodoc-process-signature", name_types)
