"""What is written to GGUF files."""

import gguf as package
import numpy as np
import pytest

from loraplus_jax.inference.write_gguf import write_gguf
from loraplus_jax.models.checkpoints.gguf import load as gguf
from loraplus_jax.models.checkpoints.gguf.header import read
from loraplus_jax.models.files import open_files

from ..models.checkpoints.gguf.files import gguf_of

pytestmark = pytest.mark.slow


def views(path):
    file = read(path)
    return {name: gguf.View(file, tensor) for name, tensor in file.tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "kinds"), [("float32", {"F32"}), ("float16", {"F32", "F16"}), ("q8_0", {"F32", "F16", "Q8_0"})]
)
def test_a_merged_model_has_the_values_and_the_metadata_of_its_base(base, tmp_path, dtype, kinds):
    """With Q8_0, rows that do not divide into blocks become F16, and vectors are float32 always."""
    folder, merge = base
    file = gguf_of(folder, tmp_path / "m.gguf")
    write_gguf(tmp_path / "out.gguf", open_files(file), merge, dtype)
    before, after = views(file), views(tmp_path / "out.gguf")
    assert {view.get_dtype() for view in after.values()} <= kinds
    for name, view in before.items():
        assert (after[name].get_dtype() == "F32") == (dtype == "float32" or len(view.get_shape()) == 1)
        tolerance = {"float32": 0, "float16": 1e-3, "q8_0": 2e-2}[dtype] * np.abs(view[:]).max()
        np.testing.assert_allclose(after[name][:], view[:], rtol=0, atol=tolerance, err_msg=name)
    ours, theirs = (read(path).metadata for path in (tmp_path / "out.gguf", file))
    assert {key: value for key, value in ours.items() if key != "general.file_type"} == theirs
    file_types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    assert ours["general.file_type"] == package.LlamaFileType[file_types[dtype]]
