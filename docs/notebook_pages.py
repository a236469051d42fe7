"""Sphinx extension: the notebooks can be opened elsewhere, and their pictures are on the front page."""

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("LORAPLUS_REPOSITORY", "")
"""`owner/name` on GitHub. The site must be its branch gh-pages: from there Colab opens the notebooks."""
INSTALL = """import importlib.util

if importlib.util.find_spec("loraplus_jax") is None:
    {command}"""
MEMORY_PLANS = ("llama2_7b@v5e:2x4", "llama2_7b@v5e:8x8", "llama2_7b@v5e:16x16")
"""Cases of `benchmarks/plans.py`."""
MEMORY_PARTS = {
    "frozen weights": "#0b5fa5",
    "trained": "#3f3f3f",
    "optimizer": "#b04a00",
    "temporaries": "#c9c9c9",
}
"""The parts of a plan's memory, each with its color."""


def add_how_to_open(app: object, docname: str, source: list[str]) -> None:
    """Adds below a notebook's title a link to open it elsewhere, and a cell that installs the package there."""
    folder, _, name = docname.rpartition("/")
    if folder != "notebooks":
        return
    extras = "train,interop" if name == "peft_round_trip" else "train"
    if REPOSITORY:
        badge = "https://colab.research.google.com/assets/colab-badge.svg"
        url = f"https://colab.research.google.com/github/{REPOSITORY}/blob/gh-pages/{docname}.ipynb"
        link = f"[![Open in Colab]({badge})]({url})"
        command = f'%pip install -q "loraplus_jax[{extras}] @ git+https://github.com/{REPOSITORY}"'
    else:
        link = f'<a href="{name}.ipynb" download>Download this notebook</a>'
        what = f"loraplus_jax is missing: run pip install -e '.[{extras}]' in a clone of the repository"
        command = f'raise ImportError("{what}")'
    cell = f"```{{code-cell}}\n:tags: [remove-cell]\n\n{INSTALL.format(command=command)}\n```"
    source[0] = re.sub(r"^# .*$", lambda m: f"{m[0]}\n\n{link}\n\n{cell}", source[0], count=1, flags=re.M)


def write_notebooks_and_gallery(app: Any, exception: Exception | None) -> None:
    """Writes each executed notebook beside its page, and the pictures of the front page into `gallery`.

    The picture NAME is the output of the cell with the tag `gallery-NAME`.
    """
    if exception or app.builder.format != "html" or app.config.nb_execution_mode == "off":
        return
    site, gallery = Path(app.outdir), Path(app.outdir) / "gallery"
    gallery.mkdir(exist_ok=True)
    for page in (HERE / "notebooks").glob("*.md"):
        executed = Path(app.env.mystnb_config.output_folder) / "notebooks" / f"{page.stem}.ipynb"
        shutil.copy(executed, site / "notebooks")
        for name, picture in tagged_pictures(json.loads(executed.read_text(encoding="utf-8"))):
            (gallery / f"{name}.png").write_bytes(picture)
    draw_memory(gallery / "memory.png")


def tagged_pictures(notebook: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name and PNG file of each picture for the front page."""
    for cell in notebook["cells"]:
        for tag in cell["metadata"].get("tags", []):
            if tag.startswith("gallery-"):
                (image,) = (
                    x["data"]["image/png"] for x in cell["outputs"] if "image/png" in x.get("data", {})
                )
                yield tag.removeprefix("gallery-"), base64.b64decode(image)


def draw_memory(path: Path) -> None:
    """Draws a chip's memory by the size of the pod, from the results of `benchmarks/plans.py`."""
    from loraplus_jax.training.metrics_log import pyplot

    results = json.loads((HERE.parent / "benchmarks" / "results" / "plan_scaling.json").read_text())
    plans = [results[name] for name in MEMORY_PLANS]
    plt = pyplot()
    with plt.rc_context(fname=HERE / "matplotlibrc"):
        figure, axes = plt.subplots()
        bottom = [0.0] * len(plans)
        for part, color in MEMORY_PARTS.items():
            sizes = [plan["memory"][part] / 1e9 for plan in plans]
            axes.bar([str(plan["devices"]) for plan in plans], sizes, bottom=bottom, color=color, label=part)
            bottom = [x + y for x, y in zip(bottom, sizes, strict=True)]
        axes.set(xlabel="chips (TPU v5e)", ylabel="GB per chip, of 16", title="Llama-2-7B: planned memory")
        axes.legend()
        figure.savefig(path)
        plt.close(figure)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    # For the kernels of the notebooks, where `!loraplus` must be the command of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {"JAX_PLATFORMS": "cpu", "MATPLOTLIBRC": str(HERE / "matplotlibrc"), "PATH": path}
    app.connect("source-read", add_how_to_open)
    app.connect("build-finished", write_notebooks_and_gallery)
