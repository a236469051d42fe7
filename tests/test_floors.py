"""The house's order: a module imports only modules above it in the list, and the core imports no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loraplus_jax"
CORE = (
    *("config", "spec", "factors", "tree", "inits", "lora", "losses"),
    *(
        "layers",
        "flow",
        "linen",
        "targets",
        "boundary",
        "adapt",
        "optim",
        "diagnostics",
        "sharding",
        "train_step",
        "theory",
        "processes",
        "checkpoint",
        "adapter_io",
        "path_map",
        "peft_options",
        "peft_leaves",
        "peft_io",
        "foreign",
    ),
)
MODELS = (
    "models.gguf_header",
    "models.gguf",
    "models.name_table",
    "models.hf",
    "models.tokenizer",
    "models.bert_config",
    "models.bert",
    "models.rope",
    "models.attention",
    "models.llama_config",
    "models.llama",
    "models.generate",
    "models.merged",
    "models.export",
    "models.gguf_export",
)
APPLICATION = tuple(
    f"train.{name}"
    for name in (
        "archives",
        "fetch",
        "rows",
        "data",
        "hosts",
        "conversations",
        "chat_template",
        "packing",
        "chat",
        "choices",
        "yaml_files",
        "settings",
        "parsing",
        "tasks",
        "language_tasks",
        "family",
        "encoders",
        "language",
        "answers",
        "report",
        "live",
        "memory",
        "lifecycle",
        "adapters",
        "optimizers",
        "chips",
        "prepare",
        "inspection",
        "hlo",
        "plan_programs",
        "plan",
        "plan_text",
        "watch",
        "screen",
        "evaluation",
        "loop",
        "sweep_settings",
        "sweep_choice",
        "sweep_verdict",
        "sweep_figures",
        "sweep_report",
        "population",
        "crew",
        "sweep",
        "use",
        "speak",
        "export",
        "cli",
    )
)
ORDER = ("", *CORE, "models", *MODELS, "train", *APPLICATION)
EXTRAS = (
    *("safetensors", "tokenizers", "grain", "jsonargparse", "rich", "matplotlib"),
    *("huggingface_hub", "tensorboardX", "yaml", "jinja2", "gguf"),
)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def files():
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """The modules of the package that a file imports, wherever in the file."""
    here = name.split(".") if name else []
    package = here if files()[name].name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(files()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found = package[: len(package) + 1 - node.level] if node.level else []
            found = [*found, *(node.module.split(".") if node.module else [])]
            targets = [".".join(found)] if node.module else [".".join([*found, a.name]) for a in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            inside = target == "loraplus_jax" or target.startswith("loraplus_jax.")
            if inside or getattr(node, "level", 0):
                yield target.removeprefix("loraplus_jax").removeprefix(".")


def test_every_file_has_its_place():
    assert sorted(files()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER[1:])
def test_a_file_imports_only_files_above_it(name):
    allowed = ORDER[1 : ORDER.index(name)]
    wrong = sorted(set(imports_of(name)) - set(allowed))
    assert not wrong, (
        f"{name} imports {', '.join(w or 'the package itself' for w in wrong)}, which is not above it"
    )


def test_imports_are_seen_at_all():
    assert {"config", "spec"} <= set(imports_of("tree"))
    assert "adapt" in set(imports_of(""))


def test_the_public_face_is_the_core_and_small():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert {node.module for node in nodes} <= set(CORE)
    assert all(alias.asname == alias.name for node in nodes for alias in node.names)
    assert 20 < len(names) <= 40
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "models", "train"])
def test_a_package_holds_no_more_than_40_names(name):
    tree = ast.parse(files()[name].read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    assert sum(len(node.names) for node in nodes) <= 40


def loaded_by(modules):
    code = f"import {modules}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_extra():
    core = loaded_by("loraplus_jax")
    assert {"jax", "flax", "optax", "orbax"} <= core
    # Flax itself loads rich and yaml.
    assert not core & set(EXTRAS) - loaded_by("jax, flax.linen, optax, orbax.checkpoint")
