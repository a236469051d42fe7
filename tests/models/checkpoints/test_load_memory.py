"""Loading needs 1.1 x the weights in their new dtype and the largest leaf, and no more anonymous memory."""

import json
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax.models.checkpoints.hub_directory import INDEX_FILE, SINGLE_FILE

from .gguf.files import metadata, write

pytestmark = pytest.mark.slow

LAYERS, WIDTH, ROWS = 8, 2048, 8192  # 50 million weights
CHILD = (
    """
import gc, json, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from loraplus_jax.models.checkpoints.params import check_params, load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.checkpoints.name_table import NameTable, embedding_rules, linear_rules
from loraplus_jax.quantization.packed_array import is_packed, packed_shape

folder, dtype, kind, wasteful = sys.argv[1], jnp.dtype(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
table = NameTable(rules=(
    *linear_rules("model.layers.{layer}.mlp.up_proj", "up", bias=False),
    *embedding_rules("model.embed_tokens", "embed"),
))
expected = {"up": {"kernel": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), dtype)},
            "embed": {"embedding": jax.ShapeDtypeStruct((ROWS, WIDTH), dtype)}}
if kind:
    shape = packed_shape(kind, (LAYERS, WIDTH, WIDTH), transposed=True, stacked=1, dtype=dtype)
    expected["up"]["kernel"] = shape

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])

peak, samples, done = 0, 0, False
def watch():
    global peak, samples
    while not done:
        peak, samples = max(peak, anonymous()), samples + 1
        time.sleep(0.0005)

files = open_files(folder)
check_params(files, table, expected)  # imports what it needs
jax.device_put(np.zeros(3)).block_until_ready()
gc.collect()
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
place = (lambda path, array: (array, jnp.array(array))) if wasteful else None
params = jax.block_until_ready(load_params(files, table, expected, place=place))
done = True
thread.join()
sizes = [leaf.nbytes if is_packed(leaf) else leaf.size * dtype.itemsize
         for leaf in jax.tree.leaves(expected, is_leaf=is_packed)]
print(json.dumps({"grown": max(peak, anonymous()) - before, "weights": sum(sizes), "largest": max(sizes),
                  "samples": samples}))
""".replace("LAYERS", str(LAYERS))
    .replace("WIDTH", str(WIDTH))
    .replace("ROWS", str(ROWS))
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    made = {name: root / name for name in ("single", "sharded", "gguf")}
    for folder in made.values():
        folder.mkdir()
    rng = np.random.default_rng(0)
    names = {f"model.layers.{n}.mlp.up_proj.weight": WIDTH for n in range(LAYERS)}
    names["model.embed_tokens.weight"] = ROWS
    content = {name: rng.random((rows, WIDTH), np.float32) for name, rows in names.items()}
    low = {name: value.astype(ml_dtypes.bfloat16) for name, value in content.items()}
    save_file(content, made["single"] / SINGLE_FILE)
    shards = {name: f"model-{n % 3}.safetensors" for n, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({n: v for n, v in low.items() if shards[n] == file}, made["sharded"] / file)
    (made["sharded"] / INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    stored = {
        n.replace("model.layers", "blk").replace("mlp.up_proj", "ffn_up"): v for n, v in content.items()
    }
    stored["token_embd.weight"] = stored.pop("model.embed_tokens.weight")
    quantised = {n: gguf.quants.quantize(v, gguf.GGMLQuantizationType.Q8_0) for n, v in stored.items()}
    write(made["gguf"] / "m.gguf", quantised, metadata(), dtypes=dict.fromkeys(quantised, "Q8_0"))
    return made


def load(folder, dtype, *, kind="", wasteful=False):
    command = [sys.executable, "-c", CHILD, str(folder), dtype, kind, str(wasteful)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    print(folder.name, dtype, {key: round(value / 2**20, 1) for key, value in found.items()})
    assert found["samples"] > 20
    return found["grown"], 1.1 * found["weights"] + found["largest"]


@pytest.mark.parametrize(("kind", "dtype"), [("sharded", "float32"), ("gguf", "bfloat16")])
def test_growth(folders, kind, dtype):
    grown, allowed = load(folders[kind], dtype)
    assert grown <= allowed


def test_packing_holds_no_wide_copy(folders):
    """No more than the packed weights and the largest leaf, which is a table half as large as the wide kernels."""
    grown, allowed = load(folders["single"], "float32", kind="nf4")
    assert grown <= allowed


def test_a_second_copy_would_be_seen(folders):
    grown, allowed = load(folders["single"], "float32", wasteful=True)
    assert grown > allowed
