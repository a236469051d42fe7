"""Two thousand damaged checkpoints: a file of one changed, cut, emptied or gone, or a stranger beside it."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import LoRAPlusConfig, init_state, open_manager, restore_checkpoint, save_checkpoint
from loraplus_jax.step.checkpoint import DamagedCheckpoint
from loraplus_jax.step.run_metadata import describe_run

from .damage import check, damaged, odd_json, peak_limit

pytestmark = pytest.mark.slow

METADATA = describe_run({}, LoRAPlusConfig(target_modules=["q"], rank=2), base="0123")
POSITION = {"batches": {"epoch": 1, "next": [7, 8]}, "rows": 12}
OLDER, NEWER = 2, 3
STRANGERS = ("7", "07", "x", "-1", "3.5", "metrics", "metadata", "²", "9" * 30, "7.orbax-checkpoint-tmp")


def state_at(step):
    rng = np.random.default_rng(step)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    factors = {"q": {"lora_a": draw(40, 20), "lora_b": draw(20, 3)}}
    state = init_state({"lora": factors}, optax.adam(1e-3), jax.random.key(0))
    return state.replace(step=jnp.array(step))


def assert_whole(restored):
    """What came back is what was saved under that step, to the bit."""
    assert restored.input_position == POSITION
    assert restored.metadata == METADATA
    got, expected = (
        jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))
        for state in (restored.state, state_at(int(restored.state.step)))
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of which the older one is the best."""
    with open_manager(tmp_path / "saved", best="loss") as manager:
        for step, loss in ((OLDER, 0.25), (NEWER, 0.5)):
            save_checkpoint(
                manager, state_at(step), metadata=METADATA, input_position=POSITION, metrics={"loss": loss}
            )
    return tmp_path / "saved"


def damage_file(rng, path):
    """Returns the bytes that the file has then."""
    data = path.read_bytes()
    how = rng.choice(("bytes", "bytes", "bytes", "json", "json", "empty", "gone"))
    if how == "json":
        try:
            data = odd_json(rng, json.loads(data)).encode(errors="surrogatepass")
        except ValueError:
            how = "bytes"
    if how == "bytes":
        data = damaged(rng, data)
    path.unlink()
    if how == "empty":
        data = b""
    if how != "gone":
        path.write_bytes(data)
    return f"{path} {how}: ".encode() + data


def add_stranger(rng, directory):
    path = directory / rng.choice(STRANGERS)
    how = rng.choice(("file", "directory", "link", "part"))
    if how == "file":
        path.write_bytes(b"{")
    elif how == "directory":
        path.mkdir()
    elif how == "link":
        path.symlink_to("nowhere")
    else:
        (path / "metrics" / "metrics").mkdir(parents=True)
    return f"{path} {how}".encode()


@pytest.fixture
def quiet_threads():
    """Not a word from reads of orbax that a damaged file has ended; some speak only at the end of the process."""
    told = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        theirs = code is not None and "orbax" in code.co_filename
        if not theirs and "Event loop is closed" not in str(unraisable.exc_value):
            told(unraisable)

    sys.unraisablehook = hook


@pytest.mark.usefixtures("quiet_threads")
def test_a_damaged_checkpoint_is_rejected_and_the_one_before_it_used(saved, tmp_path):
    run = tmp_path / "run"

    def make(rng):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(saved, run)
        if not rng.randrange(10):
            return add_stranger(rng, run)
        files = sorted(
            path for path in (run / str(NEWER)).rglob("*") if path.stat().st_size and path.is_file()
        )
        return damage_file(rng, rng.choice(files))

    def read():
        """As a run goes on: the newest is tried, and when it is damaged it steps aside."""
        with open_manager(run, best="loss") as manager:
            assert manager.best_step() in manager.all_steps()
            damage = None
            while True:
                step = manager.latest_step()
                try:
                    assert_whole(restore_checkpoint(manager, state_at(OLDER), metadata=METADATA))
                    break
                except DamagedCheckpoint as error:
                    damage = error
                    (run / str(step)).rename(tmp_path / "damaged")
                    shutil.rmtree(tmp_path / "damaged")
                    manager.reload()
        if damage:
            raise damage

    check(2000, make, read, limit=peak_limit, names=str(run), ours=(DamagedCheckpoint,))
