"""The order of the folders: a folder imports only from folders above it, and the core loads no extra."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loraplus_jax"

# A folder imports from itself and from folders above it; `loraplus_jax/__init__.pyi` stands outside the order.
PUBLIC = ("_utils", "quantization", "adapter", "optim", "inits", "interpreter")
PUBLIC += ("functions", "linen", "nnx", "step", "interop")
"""What a loop of one's own needs."""
FOLDERS = (*PUBLIC, "models", "data", "tasks", "settings", "training", "sweep", "plan", "inference", "cli")
EXTRAS = {"safetensors", "tokenizers", "grain", "pydantic", "rich", "matplotlib", "huggingface_hub"}
EXTRAS |= {"tensorboardX", "yaml", "jinja2", "gguf"}


IMPORTS = re.compile(r"from loraplus_jax\.([\w.]+) import (\([^)]*\)|.+)")


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")} | {"__init__": PACKAGE / "__init__.pyi"}


def folder_of(module):
    return module.partition(".")[0]


def imports_of(module):
    """The modules of the package that a file imports, wherever in the file."""
    here = module.split(".")
    package = here if FILES[module].name == "__init__.py" and module != "__init__" else here[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("loraplus_jax")):
            parts = package[: len(package) + 1 - node.level] if node.level else []
            parts += str(node.module).removeprefix("loraplus_jax").split(".") if node.module else []
            for alias in node.names:
                full = ".".join(filter(None, [*parts, alias.name]))
                yield full if full in FILES else ".".join(filter(None, parts)) or "__init__"
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("loraplus_jax.") for a in node.names if "loraplus_jax" in a.name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_from_those_above_it(folder):
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    wrong = [
        f"{module} imports {target}"
        for module in FILES
        if folder_of(module) == folder and module != "__init__"
        for target in imports_of(module)
        if folder_of(target) not in allowed or target == "__init__"
    ]
    assert not wrong


def test_every_folder_and_module_is_in_the_table():
    found = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found == {*FOLDERS, "__init__"} | (found & {"__pycache__"})


def test_every_module_over_80_lines_has_a_test_file_or_is_imported_by_a_test():
    tests = list(Path(__file__).parent.rglob("*.py"))
    named = {path.relative_to(Path(__file__).parent).with_name(path.name[5:]) for path in tests}
    found = IMPORTS.findall("\n".join(path.read_text("utf-8") for path in tests))
    imported = {f"{start}.{name}" for start, names in found for name in ["", *re.findall(r"\w+", names)]}
    modules = [path for path in PACKAGE.rglob("[!_]*.py") if len(path.read_text("utf-8").splitlines()) > 80]
    assert not [
        path
        for path in modules
        if path.relative_to(PACKAGE) not in named and not {f"{module_of(path)}.", module_of(path)} & imported
    ]


def test_no_two_files_import_each_other():
    graph = {module: set(imports_of(module)) & FILES.keys() for module in FILES}
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert not graph


def test_imports_are_seen_at_all():
    assert {"adapter.config", "adapter.spec"} <= set(imports_of("adapter.tree"))
    assert "linen.wrap" in set(imports_of("__init__"))
    assert "models.checkpoints.gguf.header" in set(imports_of("models.checkpoints.gguf.load"))


def test_the_public_names_are_the_core_s_and_few():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert {folder_of(str(node.module)) for node in nodes} <= set(PUBLIC)
    assert all(alias.asname == alias.name for node in nodes for alias in node.names)
    assert 20 < len(names) <= 40
    assert len(set(names)) == len(names)


def loaded_by(*parts):
    """The modules that a process has loaded after each part of its code."""
    code = "\n".join(f"{part}; import sys; print('modules', *sys.modules)" for part in parts)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in run.stdout.splitlines() if line.startswith("modules ")]


@pytest.mark.slow
def test_the_public_names_load_no_extra():
    """Flax itself loads rich and yaml."""
    before, after = loaded_by("import jax, flax.linen, optax, orbax.checkpoint", "from loraplus_jax import *")
    assert "loraplus_jax.optim" in after
    assert not {name.partition(".")[0] for name in after - before} & EXTRAS
    assert "loraplus_jax.nnx" not in after  # nor NNX


def test_importing_the_package_and_the_command_line_s_help_load_no_jax():
    *_, last = loaded_by(
        "import loraplus_jax", "from loraplus_jax.cli.commands import main; main(['--help'])"
    )
    assert "jax" not in last
