"""Trees of arrays from the files of other libraries."""

import json
import os
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

from loraplus_jax._utils import untrusted
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
    (tmp_path / "steps/latest").symlink_to("7")
    (tmp_path / "steps/loop").symlink_to("..")
    check(read_tree(tmp_path / "steps"))
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
    with pytest.raises(ValueError, match=mentions("damaged.npz")):
        read_tree(content[0])
    np.savez(tmp_path / "x.npz", a=np.array([object()]))
    with pytest.raises(ValueError, match=mentions("x.npz", "allow_pickle")):
        read_tree(tmp_path / "x.npz")


def change_metadata(path, **changes):
    """Changes what an array's own file says of it."""
    file = path / "layer.lora_a/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def fifo(path):
    (path / "manifest.ocdbt").unlink()
    os.mkfifo(path / "manifest.ocdbt")


def endless(path):
    (path / "_METADATA").unlink()
    (path / "_METADATA").symlink_to("/dev/zero")


def link_to_fifo(path):
    shutil.rmtree(path / "layer.lora_a")
    (path.parent / "other").mkdir()
    os.mkfifo(path.parent / "other/.zarray")
    (path / "layer.lora_a").symlink_to(path.parent / "other")


HOSTILE = {
    "manifest is a FIFO": (fifo, ("manifest.ocdbt", "FIFO")),
    "endless": (endless, ("_METADATA", "device")),
    "deep": (lambda path: (path / "_METADATA").write_text("[" * 100_000), ("recursion",)),
    "large": (lambda path: change_metadata(path, shape=[10**6] * 2), ("64 MiB",)),
    "hidden FIFO": (link_to_fifo, ("layer.lora_a", "symbolic link")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_an_orbax_checkpoint_of_another_is_not_trusted(name, tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "FILE_SECONDS", 1)
    change, words = HOSTILE[name]
    is_plain = name.startswith(("large", "hidden"))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=not is_plain)) as checkpointer:
        checkpointer.save(tmp_path / "bad", TREE)
    change(tmp_path / "bad")
    with pytest.raises(ValueError, match=mentions("bad", *words)):
        read_tree(tmp_path / "bad")


def test_two_paths_of_a_checkpoint_with_one_name(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "a", {"a": {"b/c": np.ones(2)}, "a/b": {"c": np.ones(1)}})
    with pytest.raises(ValueError, match=mentions("a/b/c")):
        read_tree(tmp_path / "a")


def npy(shape, data=b"", kind="<f4", pad=0):
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}{' ' * pad}\n".encode()
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header + data


FLOAT = npy((1,), bytes(4))
NPZ = {
    "bomb": ([("a.npy", npy((2**25,), bytes(2**27)))], ("memory",)),
    "large": ([("a.npy", npy((10**6,) * 2))], ("64 MiB",)),
    "header": ([("a.npy", npy((1,), bytes(4), pad=2 * 10**6))], ("2000058",)),
    "object": ([("a.npy", npy((1,), b"cos\nsystem\n.", "|O"))], ("allow_pickle",)),
    "twice": ([("a.npy", FLOAT), ("a", FLOAT)], ("one name",)),
    "name": ([("x" * 60_000, FLOAT)], (60_000, 1000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NPZ)
def test_an_npz_file_of_another_is_not_trusted(name, tmp_path):
    entries, words = NPZ[name]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for entry, content in entries:
            file.writestr(entry, content)
    with pytest.raises(ValueError, match=mentions("a.npz", *words)) as caught:
        read_tree(tmp_path / "a.npz")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a", "a.npz", "a.safetensors"])
def test_a_fifo_is_no_tree(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=mentions(name, "FIFO")):
        read_tree(tmp_path / name)
