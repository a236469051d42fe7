"""Trees of arrays from the files of other libraries."""

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

from loraplus_jax.interop.factor_trees import read_tree

from ..messages import mentions

TREE = {"layer": {"lora_a": np.ones((4, 2), np.float32), "lora_b": np.zeros((2, 3), np.float32)}}


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def check(tree):
    assert {path: x.shape for path, x in tree.items()} == {"layer/lora_a": (4, 2), "layer/lora_b": (2, 3)}
    assert all(isinstance(x, np.ndarray) for x in tree.values())
    np.testing.assert_array_equal(tree["layer/lora_a"], TREE["layer"]["lora_a"])


def test_orbax_checkpoints(tmp_path):
    save_orbax(tmp_path / "plain", {"params": TREE})
    check(read_tree(tmp_path / "plain"))
    state = nnx.State({"layer": {name: nnx.LoRAParam(x) for name, x in TREE["layer"].items()}})
    save_orbax(tmp_path / "steps/7/model_params", state)
    check(read_tree(tmp_path / "steps"))  # as tunix and orbax's manager nest them
    with pytest.raises(ValueError, match=mentions("2", "plain", "steps/7/model_params")):
        read_tree(tmp_path)


def test_files(tmp_path):
    flat = {f"layer.{name}": x for name, x in TREE["layer"].items()}
    save_file(flat, tmp_path / "adapter.safetensors")
    check(read_tree(tmp_path / "adapter.safetensors"))
    check(read_tree(tmp_path))
    np.savez(tmp_path / "adapter.npz", **flat)
    check(read_tree(tmp_path / "adapter.npz"))
    with pytest.raises(ValueError, match=mentions("layer.lora_a", "another")):
        read_tree(tmp_path)


def test_bfloat16_of_numpy(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", **{"a/lora_a": values})
    found = read_tree(tmp_path / "a.npz")["a/lora_a"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_what_is_no_tree(tmp_path):
    with pytest.raises(FileNotFoundError, match=mentions("nothing")):
        read_tree(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=mentions("orbax", ".safetensors")):
        read_tree(tmp_path)
    (tmp_path / "x.lora.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=mentions("keras-hub's", "safetensors.numpy.save_file")):
        read_tree(tmp_path / "x.lora.h5")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=mentions(".npz")):
        read_tree(tmp_path / "x.bin")
    content = (tmp_path / "damaged.npz", np.arange(500.0))
    np.savez_compressed(content[0], a=content[1])
    damaged = bytearray(content[0].read_bytes())
    damaged[60:80] = bytes(20)
    content[0].write_bytes(damaged)
    with pytest.raises(ValueError, match=mentions("damaged.npz", "damaged")):
        read_tree(content[0])
    np.savez(tmp_path / "x.npz", a=np.array([object()]))
    with pytest.raises(ValueError, match=mentions("x.npz", "damaged")):
        read_tree(tmp_path / "x.npz")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=mentions("broken", "orbax")):
        read_tree(tmp_path / "broken")
