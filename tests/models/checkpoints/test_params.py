import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save, save_file

from loraplus_jax import make_mesh
from loraplus_jax.adapter.tree import flatten
from loraplus_jax.models.checkpoints import params as loading
from loraplus_jax.models.checkpoints.hub_directory import INDEX_FILE, SINGLE_FILE
from loraplus_jax.models.checkpoints.name_table import NameTable, embedding_rules, linear_rules, norm_rules
from loraplus_jax.models.checkpoints.params import check_params, load_params, rows_digest
from loraplus_jax.models.files import open_files

from ...messages import assert_mentions, mentions
from ...refusals import refusals

TABLE = NameTable(
    rules=(
        *embedding_rules("tok", "embed"),
        *linear_rules("h.{layer}.fc", "layers/up"),
        *norm_rules("h.{layer}.ln", "layers/norm", bias=False),
    ),
    renames=((r"^model\.", ""),),
    ignore=(r"h\.\d+\.position_ids", r"lm_head\..*"),
)
EXPECTED = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    {
        "embed": {"embedding": (7, 3)},
        "layers": {"up": {"kernel": (2, 3, 4), "bias": (2, 4)}, "norm": {"scale": (2, 3)}},
        "head": {"kernel": (3, 5)},
    },
    is_leaf=lambda x: isinstance(x, tuple),
)


def tensors(prefix=""):
    """A complete checkpoint, with what the table ignores."""
    shapes = {"tok.weight": (7, 3)}
    for layer in range(2):
        shapes |= {f"h.{layer}.fc.weight": (4, 3), f"h.{layer}.fc.bias": (4,), f"h.{layer}.ln.weight": (3,)}
    rng = np.random.default_rng(0)
    result = {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return result | {f"{prefix}h.0.position_ids": np.arange(4), "lm_head.bias": np.zeros((), np.float32)}


def write(folder, content):
    save_file(content, folder / SINGLE_FILE)
    return folder


def write_shards(folder, shards, weight_map=None):
    listed = {name: file for file, content in shards.items() for name in content}
    for file, content in shards.items():
        save_file(content, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": listed | (weight_map or {})}))
    return folder


def load(folder, table=TABLE, **kwargs):
    return load_params(open_files(folder), table, EXPECTED, **({"new": ("head",)} | kwargs))


def counted(monkeypatch):
    """The numbers of values read of each tensor, as they are asked for."""
    read, copy = [], loading._copy

    def count(values, target):
        read.append(values.size)
        copy(values, target)

    monkeypatch.setattr(loading, "_copy", count)
    return read


PLACES = {
    "embed/embedding": P(None, None),
    "layers/up/kernel": P(None, None, "fsdp"),
    "layers/up/bias": P(None, "fsdp"),
    "layers/norm/scale": P(None, None),
}


def test_every_part_is_read_once_and_sharded_as_asked(tmp_path, monkeypatch):
    whole = load(write(tmp_path, tensors()))
    shardings = {path: NamedSharding(make_mesh(2, 4, 1), spec) for path, spec in PLACES.items()}
    read = counted(monkeypatch)
    params = load(tmp_path, shardings=shardings)
    assert sum(read) == 7 * 3 + 2 * (3 * 4 + 4 + 3)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert {path: leaf.sharding for path, leaf in flatten(params).items()} == shardings


def test_a_process_reads_only_what_its_devices_hold(tmp_path, monkeypatch):
    """Of eight devices the first two are this process's: a half of what fsdp splits in four."""
    shardings = {path: NamedSharding(make_mesh(2, 4, 1), spec) for path, spec in PLACES.items()}
    write(tmp_path, tensors())

    def on_two_devices(shape, sharding, callback):
        mine = list(sharding.devices_indices_map(shape).items())[:2]
        return [np.array(callback(index)) for _, index in mine]

    whole = load(tmp_path)
    monkeypatch.setattr(jax, "make_array_from_callback", on_two_devices)
    read = counted(monkeypatch)
    parts = load(tmp_path, shardings=shardings)
    assert sum(read) == 7 * 3 + 2 * ((3 * 4 + 4) // 2 + 3)
    kernel = np.concatenate(parts["layers"]["up"]["kernel"], axis=-1)
    np.testing.assert_array_equal(kernel, whole["layers"]["up"]["kernel"][..., :2])


def halves():
    items = sorted(tensors().items())
    return {"model-1-of-2.safetensors": dict(items[:4]), "model-2-of-2.safetensors": dict(items[4:])}


def error(folder):
    """The whole message with which the directory is rejected."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layers_are_stacked_and_kernels_transposed(tmp_path, prefix):
    content = tensors(prefix)
    params = load(write(tmp_path, content))
    assert type(params) is dict
    assert set(params) == {"embed", "layers"}
    np.testing.assert_array_equal(params["embed"]["embedding"], content[f"{prefix}tok.weight"])
    for layer in range(2):
        name = f"{prefix}h.{layer}"
        np.testing.assert_array_equal(params["layers"]["up"]["kernel"][layer], content[f"{name}.fc.weight"].T)
        np.testing.assert_array_equal(params["layers"]["up"]["bias"][layer], content[f"{name}.fc.bias"])
        np.testing.assert_array_equal(params["layers"]["norm"]["scale"][layer], content[f"{name}.ln.weight"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_sharded_equals_single(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    single = load(write(tmp_path / "one", tensors()))
    sharded = load(write_shards(tmp_path / "two", halves()))
    jax.tree.map(np.testing.assert_array_equal, sharded, single)


def test_shards_may_be_links_out_of_the_directory_as_in_the_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/0123").mkdir(parents=True)
    write(tmp_path / "blobs", tensors())
    (tmp_path / "snapshots/0123" / SINGLE_FILE).symlink_to(f"../../blobs/{SINGLE_FILE}")
    assert set(load(tmp_path / "snapshots/0123")) == {"embed", "layers"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / SINGLE_FILE).symlink_to(f"../blobs/{SINGLE_FILE}")
    with pytest.raises(
        ValueError, match=mentions(tmp_path / "other" / SINGLE_FILE, "symbolic link", "blobs")
    ):
        load(tmp_path / "other")


@pytest.mark.parametrize("given", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_dtypes_come_from_expected_or_param_dtype(tmp_path, given):
    content = {k: v.astype(given) if v.dtype == np.float32 else v for k, v in tensors().items()}
    write(tmp_path, content)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(tmp_path))} == {"float32"}
    low = load(tmp_path, param_dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(low)} == {"bfloat16"}
    expected = content["h.1.fc.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(low["layers"]["up"]["kernel"][1], expected)


@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("given", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("padding", [0, 1])
def test_bits_are_those_of_numpy(tmp_path, monkeypatch, given, wanted, padding):
    """More rows than are copied at a time, in several pieces, also at an odd place in the file."""
    monkeypatch.setattr(loading, "_PIECE", 4 * 5 * 200)
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        content = {
            name: rng.normal(scale=1e3, size=(300, 5)).astype(given) for name in ("fc.weight", "tok.weight")
        }
    for value in content.values():
        value[:3, 0] = np.inf, np.nan, -0.0
    data = save(content)
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip() + b" " * padding
    header += b" " * ((padding - len(header)) % 8)
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    table = NameTable(rules=(*linear_rules("fc", "up", bias=False), *embedding_rules("tok", "embed")))
    shapes = {"up": {"kernel": (5, 300)}, "embed": {"embedding": (300, 5)}}
    expected = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, wanted), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    params = load_params(open_files(tmp_path), table, expected)
    for value, name in (
        (params["up"]["kernel"].T, "fc.weight"),
        (params["embed"]["embedding"], "tok.weight"),
    ):
        assert np.asarray(value).tobytes() == content[name].astype(wanted).tobytes()


def test_a_file_that_changes_later_does_not_change_what_was_loaded(tmp_path):
    params = load(write(tmp_path, tensors()))
    before = jax.tree.map(np.array, params)
    path = tmp_path / SINGLE_FILE
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(path.read_bytes()[:8], "little"))
        file.write(bytes(path.stat().st_size - file.tell()))
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("given", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_read_of_floats_makes_no_copy(tmp_path, given):
    content = {name: value.astype(given) for name, value in tensors().items() if name != "lm_head.bias"}
    write(tmp_path, content)
    _, found = check_params(open_files(tmp_path), TABLE, EXPECTED, new=("head",))
    for name, tensor in found.items():
        read = tensor.view[1:]
        assert np.shares_memory(read, tensor.view[:])
        assert read.tobytes() == content[name][1:].tobytes()


def test_memory_that_is_too_small_is_not_an_error_of_the_file():
    with pytest.raises(MemoryError, match="weights"):
        loading._empty((2**61,), np.uint8)


def test_place_gets_each_leaf_on_the_host(tmp_path):
    seen = {}
    result = load(write(tmp_path, tensors()), place=lambda path, array: seen.setdefault(path, array).shape)
    assert result["layers"]["up"]["kernel"] == (2, 3, 4)
    assert set(seen) == {"embed/embedding", "layers/up/kernel", "layers/up/bias", "layers/norm/scale"}
    assert all(type(array) is np.ndarray for array in seen.values())


def test_every_problem_is_listed_at_once(tmp_path):
    content = tensors()
    del content["h.1.fc.bias"]
    content["h.2.fc.bias"] = np.zeros(4, np.float32)
    content["tok.weight"] = np.zeros((8, 3), np.float32)
    content["h.0.ln.weight"] = np.zeros(3, np.int8)
    lines = error(write(tmp_path, content)).splitlines()
    assert_mentions(lines[0], tmp_path, "1 missing", "1 extra", "2 misshapen")
    listed = sorted([lines[0].rpartition("first: ")[2], *map(str.strip, lines[1:])])
    assert [line.split()[:2] for line in listed] == [
        ["+", "h.2.fc.bias"],
        ["-", "h.1.fc.bias"],
        ["~", "h.0.ln.weight"],
        ["~", "tok.weight"],
    ]
    for line, words in zip(
        listed, (["[4]"], ["[4]"], ["I8", "F64", "F32", "F16", "BF16"], ["[8, 3]", "[7, 3]"]), strict=True
    ):
        assert_mentions(line, *words)


def test_long_lists_end_in_a_count(tmp_path):
    content = tensors() | {f"more.{i}": np.zeros(1, np.float32) for i in range(33)}
    lines = error(write(tmp_path, content)).splitlines()
    assert len(lines) == 21
    assert_mentions(lines[-1], 13)


def read_config(folder):
    return open_files(folder).config


def holding(content, name=SINGLE_FILE, read=load):
    """A directory of one file."""

    def call(tmp_path):
        (tmp_path / name).write_bytes(content)
        read(tmp_path)

    return call


def changed(name, shape):
    return lambda tmp_path: load(write(tmp_path, tensors() | {name: np.zeros(shape, np.float32)}))


def without(*new):
    return lambda tmp_path: load(write(tmp_path, tensors()), new=new)


def indexed(entry, name="tok.weight"):
    """A directory of two shards, beside a file that is not in it."""

    def call(tmp_path):
        write(tmp_path, tensors()).joinpath(SINGLE_FILE).rename(tmp_path / "x.safetensors")
        (tmp_path / "inner").mkdir()
        load(write_shards(tmp_path / "inner", halves(), {name: entry}))

    return call


WHOLE, POINTER = save(tensors()), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PICKLE = pickle.dumps({"tok.weight": 0})
OUTSIDE = (
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/x.safetensors",
    r"..\x.safetensors",
    "C:x.safetensors",
)
FIRST, *_ = halves()

test_directories_that_are_rejected = refusals(
    (changed("h.0.fc.weight", (3, 4)), "h.0.fc.weight", "misshapen", "[3, 4]", "[4, 3]"),  # not transposed
    (changed("model.tok.weight", (7, 3)), "model.tok.weight", "extra", "second"),  # another spelling
    *((holding(WHOLE[:cut]), SINGLE_FILE, "safetensors") for cut in (-5, 40, 3, 0)),
    (holding(POINTER), "Git LFS pointer"),
    *((indexed(entry), repr(entry)) for entry in (*OUTSIDE, "..", 3, "a\n.safetensors")),
    (indexed("x" * 300 + ".safetensors"), "x" * 300 + ".safetensors is missing", "index"),
    (indexed(FIRST, "ghost"), "- ghost", FIRST),
    *((holding(x, INDEX_FILE), INDEX_FILE) for x in (b"{", b"[]", b"{}", b'{"weight_map": {}}')),
    (holding(b'{"weight_map": [1]}', INDEX_FILE), INDEX_FILE),
    (holding(PICKLE, "pytorch_model.bin"), "pytorch_model.bin", "pickle", "safe_serialization=True"),
    (lambda tmp_path: load(tmp_path), SINGLE_FILE, INDEX_FILE),
    (lambda tmp_path: load(tmp_path / "nowhere"), "nowhere", "directory"),
    (without(), "['head/kernel']"),
    (without("head", "embed"), "['embed/embedding']"),
    (without("hea"), "['hea']"),
    (lambda tmp_path: read_config(tmp_path), "config.json", "missing"),
    (holding(b"{,", "config.json", read_config), "config.json", "JSON"),
    (holding(b"[1]", "config.json", read_config), "config.json", "JSON object", "list"),
    (holding(b'{"a": "\xff"}', "config.json", read_config), "config.json", "JSON"),
    lines=3,
)


def test_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert open_files(str(tmp_path)).config == {"model_type": "bert"}


def test_a_tensor_that_repeats_another_must_have_its_values(tmp_path):
    table = NameTable(rules=TABLE.rules, ignore=TABLE.ignore[:1], copies=(("lm_head.weight", "tok.weight"),))
    content = {name: value for name, value in tensors().items() if name != "lm_head.bias"}
    alone = load(write(tmp_path, content), table)
    both = load(write(tmp_path, content | {"lm_head.weight": content["tok.weight"]}), table)
    jax.tree.map(np.testing.assert_array_equal, alone, both)
    for other in (content["tok.weight"] + np.eye(7, 3, dtype=np.float32), content["tok.weight"][:6]):
        write(tmp_path, content | {"lm_head.weight": other})
        with pytest.raises(ValueError, match=mentions("lm_head.weight", "tok.weight")):
            load(tmp_path, table)


def test_three_rows_of_every_tensor_distinguish_files(tmp_path):
    def digest(name, change=lambda content: None):
        content, folder = tensors(), tmp_path / name
        change(content)
        folder.mkdir()
        return rows_digest(
            check_params(open_files(write(folder, content)), TABLE, EXPECTED, new=("head",))[1]
        )

    def row(number):
        return lambda content: content["tok.weight"].__setitem__((number, 0), 9.0)

    def narrower(content):
        content["tok.weight"] = content["tok.weight"].astype(np.float16)

    plain = digest("plain")
    assert digest("same") == plain
    (tmp_path / "shards").mkdir()
    halves = sorted(tensors().items())
    shards = {f"part-{n}.safetensors": dict(halves[n::2]) for n in range(2)}
    found = check_params(
        open_files(write_shards(tmp_path / "shards", shards)), TABLE, EXPECTED, new=("head",)
    )[1]
    assert rows_digest(found) == plain
    changed = [digest(f"row {n}", row(n)) for n in (0, 3, 6)]
    assert len({plain, *changed, digest("narrower", narrower)}) == 5
    assert digest("row 1", row(1)) == plain  # not read


@pytest.mark.parametrize("rows", [1, 2])
def test_short_tensors_are_read_whole(tmp_path, rows):
    table = NameTable(rules=embedding_rules("tok", "embed"))
    expected = {"embed": {"embedding": jax.ShapeDtypeStruct((rows, 2), jnp.float32)}}
    found = set()
    for change in range(-1, rows):
        values = np.zeros((rows, 2), np.float32)
        if change >= 0:
            values[change] = 1
        found.add(
            rows_digest(check_params(open_files(write(tmp_path, {"tok.weight": values})), table, expected)[1])
        )
    assert len(found) == rows + 1
