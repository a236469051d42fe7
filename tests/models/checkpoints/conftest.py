import dataclasses

import jax
import pytest

from loraplus_jax.adapter.tree import flatten
from loraplus_jax.inference.checkpoint_merge import CheckpointMerge
from loraplus_jax.models.checkpoints.params import check_params, load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.model import GPT2, name_table

from ..golden import IDS, write_golden


@pytest.fixture
def split(models):
    """A GPT-2 whose fused layers are split, and the shapes of its parameters."""
    model = GPT2(dataclasses.replace(models("gpt2_tied")[1].config, split_fused=True))
    return model, jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]


@pytest.fixture
def base(split, tmp_path):
    """A directory with its weights, and a merge as if all of them had been trained, which changes no value."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write_golden("gpt2_tied", folder)
    table = name_table(split[0].config)
    leaves, _ = check_params(open_files(folder), table, split[1])
    params = load_params(open_files(folder), table, split[1])
    return folder, CheckpointMerge(table, leaves, {}, {}, flatten({"params": params}))
