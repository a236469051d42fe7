"""`benchmarks/gpu.py` where there is no GPU."""

import pytest


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path, capsys):
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
