"""Loads a model and prints seconds, for `startup.py`: `startup_loaders.py here|transformers PATH`.

PATH is a GGUF file or a Hugging Face directory; the weights become float32.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def here(path: Path) -> Callable[[], list[Any]]:
    """This package; importing takes place before the call of the result."""
    import gguf  # noqa: F401
    import jax
    import jax.numpy as jnp
    import numpy as np
    import safetensors  # noqa: F401

    from loraplus_jax.models.checkpoints.hf import load_config, load_params
    from loraplus_jax.models.llama.config import LlamaConfig
    from loraplus_jax.models.llama.model import Llama, name_table

    jax.devices()

    def load() -> list[Any]:
        config = LlamaConfig.from_hf(load_config(path))
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        expected = jax.eval_shape(Llama(config).init, jax.random.key(0), ids)["params"]
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(path, name_table(config), expected))]

    return load


def transformers(path: Path) -> Callable[[], list[Any]]:
    """transformers' `from_pretrained`."""
    import gguf  # noqa: F401
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(2)

    def load() -> list[Any]:
        is_file = path.is_file()
        directory, options = (path.parent, {"gguf_file": path.name}) if is_file else (path, {})
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        return [x.detach().numpy() for x in model.parameters()]

    return load


def main() -> None:
    implementation, path = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    load = {"here": here, "transformers": transformers}[implementation](Path(path))
    start = time.perf_counter()
    arrays = load()
    # A value of every page.
    total = sum(float(x.reshape(-1)[:: 4096 // x.itemsize].astype("float64").sum()) for x in arrays)
    print(
        json.dumps(
            {"seconds": time.perf_counter() - start, "size": sum(x.size for x in arrays), "sum": total}
        )
    )


if __name__ == "__main__":
    main()
