"""Every example runs, and does what it says."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from loraplus_jax.settings.parsing import setting_fields
from loraplus_jax.sweep.settings import SweepRun

# tests/others runs those that need other packages: 08_tunix.py, 09_gemma.py, 10_bonsai.py, 11_equinox.py and
# 13_haiku.py.
EXAMPLES = Path(__file__).parents[2] / "examples"
HOLDS = {
    "01_own_loop.py": lambda before, after, same: after < 0.01 * before and same < 1e-5,
    "02_many_devices.py": lambda difference: difference < 1e-6,  # pmap and a mesh
    "03_raw_parameters.py": lambda before, after, same: after < 0.3 * before and same < 1e-4,
    "04_adapters_of_others.py": lambda roles, ratio, before, after: (
        roles == ["a", "b", "a", "b"] and ratio == pytest.approx(4, rel=1e-4) and after < 0.1 * before
    ),
    "05_trained_extras.py": lambda accuracy, moved: accuracy > 0.95 and moved > 0.01,
    "06_restore_elsewhere.py": lambda before, after, same: after < 0.2 * before and same < 1e-5,
    "07_nnx_loop.py": lambda before, after, same: after < 0.6 * before and same < 1e-5,
    "12_plain_transformer.py": lambda before, after, same, whole: (
        after < 0.4 * before and same < 1e-4 and whole == 0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDS)
def test_an_example_learns_and_its_ways_agree(name):
    found = runpy.run_path(str(EXAMPLES / name))["main"]()
    found = found if isinstance(found, tuple) else (found,)
    assert HOLDS[name](*found), found


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested(path):
    assert path.name in Path(__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "launch").iterdir()), ids=lambda p: p.name)
def test_a_launch_file_is_well_formed_and_names_settings_and_the_lines_to_change(path):
    text = path.read_text(encoding="utf-8")
    assert "two lines to change" in text
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
    else:
        assert all(part["apiVersion"] and part["kind"] for part in yaml.safe_load_all(text))
    command = next(line for line in text.splitlines() if re.search(r"loraplus,? (train|sweep)", line))
    options = re.findall(r"--(\w+\.\w+)", command) + re.findall(r"--(sweep\.\w+|distributed\.\w+)", text)
    assert options
    assert set(options) <= {field.name for field in setting_fields(SweepRun)}
