"""The house's order: a module imports only modules above it in the list, and the core imports no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loraplus_jax"
ORDER = (
    "",
    *[
        "config",
        "spec",
        "factor_pairs",
        "tree",
        "inits",
        "lora",
        "losses",
        "linen",
        "linen.layer_table",
        "linen.dataflow",
        "linen.layers",
        "rules",
        "linen.collections",
        "linen.wrap",
        "optim",
        "optim.lora_plus",
        "optim.diagnostics",
        "sharding",
        "train_step",
        "theory",
        "multihost",
        "checkpoint",
        "interop",
        "interop.adapter_files",
        "interop.path_map",
        "interop.peft_config",
        "interop.peft_modules_to_save",
        "interop.peft_files",
        "interop.other_libraries",
        "models",
        "models.gguf",
        "models.gguf.header",
        "models.gguf.load",
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
        "models.gguf.export",
        "data",
        "data.archives",
        "data.fetch",
        "data.readers",
        "data.splits",
        "training",
        "training.distributed",
        "data.conversations",
        "data.chat_template",
        "data.packing",
        "data.chat",
        "data.multiple_choice",
        "settings",
        "settings.yaml_files",
        "settings.schema",
        "settings.parsing",
        "tasks",
        "tasks.classification",
        "tasks.language_losses",
        "tasks.interface",
        "tasks.encoder",
        "tasks.causal_lm",
        "tasks.sample_answers",
        "training.metrics_log",
        "training.theory_metrics",
        "training.memory",
        "training.run_directory",
        "training.init_adapter",
        "training.optimizer",
        "plan",
        "plan.tpu",
        "training.setup",
        "training.inspect",
        "plan.hlo",
        "plan.programs",
        "plan.plan",
        "plan.text",
        "training.anomalies",
        "training.console",
        "training.evaluation",
        "training.trainer",
        "sweep",
        "sweep.settings",
        "sweep.halving",
        "sweep.statistics",
        "sweep.figures",
        "sweep.report",
        "sweep.population",
        "sweep.slots",
        "sweep.run",
        "inference",
        "inference.predict",
        "inference.generate",
        "inference.export",
        "cli",
    ],
)
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
    assert "linen.wrap" in set(imports_of(""))


def test_the_public_face_is_the_core_and_small():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert all(alias.asname == alias.name for node in nodes for alias in node.names)
    assert 20 < len(names) <= 40
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "models"])
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
