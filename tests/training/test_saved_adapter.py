"""Which directory is an adapter's, and in which format."""

import pytest

from loraplus_jax.training.saved_adapter import find_adapter, is_peft, require_adapter

from ..messages import mentions


def test_an_unfinished_run_says_how_far_it_got(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/110").mkdir(parents=True)
    (run / "checkpoints/50").mkdir()
    (run / "config.yaml").write_text("train: {steps: 400}\n")
    with pytest.raises(FileNotFoundError, match=mentions("run", 110, 400, "train")):
        require_adapter(run)
    (run / "config.yaml").write_text("train: {epochs: 2.0}\n")
    with pytest.raises(FileNotFoundError, match=mentions("step", 110)):
        require_adapter(run)
    (run / "summary.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=mentions("adapter.json", "adapter_config.json")):
        require_adapter(run)


@pytest.mark.parametrize(("name", "peft"), [("adapter.json", False), ("adapter_config.json", True)])
def test_an_adapter_is_found_in_a_run_and_in_its_own_directory(tmp_path, name, peft):
    adapter = tmp_path / "run/adapter"
    adapter.mkdir(parents=True)
    assert find_adapter(tmp_path / "run") is None
    (adapter / name).write_text("{}")
    assert find_adapter(tmp_path / "run") == find_adapter(adapter) == require_adapter(adapter) == adapter
    assert is_peft(adapter) is peft
