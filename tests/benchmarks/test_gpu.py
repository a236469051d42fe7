"""`benchmarks/gpu.py` where there is no GPU."""

import pytest


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path):
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu.main()
    assert not list(tmp_path.iterdir())
