"""The model card of an export: front matter that the Hub reads, and tables of training and evaluation."""

import dataclasses
import html
import json
import shutil

import huggingface_hub
import pytest
from markdown_it import MarkdownIt

from loraplus_jax.inference.model_card import PAPER, model_card, shown_name
from loraplus_jax.inference.tuned_model import describe
from loraplus_jax.training.place import look
from loraplus_jax.training.saved_adapter import read_adapter, transformers_class_of

from ..integration.runs import printed

pytestmark = pytest.mark.usefixtures("cache")

SUMMARY = {
    "before": {"accuracy": 0.5, "loss": None},
    "after": {"accuracy": 0.75, "loss": None, "f1": 0.25},
    "constant": {"accuracy": 0.625},
    "examples": {"train": 1200, "validation": 30, "test": 40},
    "held_out": {"split": "test", "examples": 40},
    "selected_step": 3000,
}


def table_of(card):
    """The first two cells of every row of a card's tables, as a dict."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.slow
def test_a_run_s_card_has_its_data_rates_lambda_and_evaluation(untrained, tmp_path, capsys):
    run, to = tmp_path / "run", tmp_path / "to"
    shutil.copytree(untrained.out, run)
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    printed(capsys, "export", run, "--to", to)
    text = (to / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    results = {
        (result.dataset_name, result.dataset_split, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    assert results == {("texts.csv", "test", "accuracy"): 0.75, ("texts.csv", "test", "f1"): 0.25}
    config = json.loads((to / "loraplus.json").read_text())["config"]
    rate = json.loads((to / "loraplus.json").read_text())["settings"]["optimizer"]["learning_rate"]
    table = table_of(text)
    assert table["data"] == ["texts.csv: 1,200 train, 30 validation, 40 test"]
    assert table["rank, alpha"] == [f"{config['rank']}, {config['alpha']:g}"]
    (ratio,) = (cells for name, cells in table.items() if "`lr_ratio`" in name)
    assert ratio == [f"{config['lr_ratio']:g}"]
    assert table["learning rates"][0].startswith(f"A {rate:g}, B {rate * config['lr_ratio']:g}, ")
    assert table["steps, batch size"][0].startswith("3,000, ")
    assert (table["accuracy"], table["loss"], table["f1"]) == (
        ["0.5000", "0.7500", "0.6250"],
        ["-", "-", "-"],
        ["-", "0.2500", "-"],
    )


MARKUP = "<script>1</script> <img src=x onerror=1>\x1b[31m ![x](y) `a` | **b** https://c.d<b>\n---\n# e"


@pytest.mark.slow
def test_names_of_others_are_text_in_yaml_markdown_and_html(untrained):
    tuned = describe(look(untrained.out))
    own = dataclasses.replace(tuned.settings, data=dataclasses.replace(tuned.settings.data, path=MARKUP))
    task = dataclasses.replace(tuned.task, names=(MARKUP, "a_b: no"))
    combined = {"how": MARKUP, "adapters": [{"weight": 1, "name": MARKUP}]}
    summary = {
        "before": {MARKUP: 0.5},
        "after": {MARKUP: 0.75},
        "examples": {MARKUP: 1},
        "held_out": {"split": MARKUP, "examples": 4},
        "selected_step": 1,
    }
    adapter = read_adapter(tuned.place, tuned.parts)
    form = transformers_class_of(tuned.parts)
    for notes in ({"versions": {MARKUP: MARKUP}}, {"versions": {}, "combined": combined}):
        place = tuned.place._replace(notes=notes)
        described = tuned._replace(settings=own, task=task, place=place)
        card = model_card("adapter", described, adapter, form, summary, base=MARKUP)
        # The whole, front matter too, as a viewer that knows none would show it.
        blocks = MarkdownIt("commonmark", {"linkify": True}).enable(["table", "strikethrough"]).parse(card)
        kinds = {token.type for block in blocks for token in (block, *(block.children or ()))}
        assert not kinds & {"html_block", "html_inline", "image", "strong_open"}, kinds
        assert "\x1b" not in card
        texts = [block.content.replace(PAPER, "") for block in blocks if block.type == "inline"]
        assert not any("https://" in text for text in texts)
        front = huggingface_hub.ModelCard(card).data.to_dict()["model-index"][0]["results"][0]
        shown = MARKUP.replace("\x1b", "\\u001b").replace("\n", "\\n")
        names = front["dataset"]["split"], front["metrics"][0]["type"]
        assert list(map(html.unescape, names)) == [shown, shown]
        assert "a_b: no" in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("movie-reviews", "movie-reviews"),
        ("glue/mnli", "glue/mnli"),
        ("org/set/files/a.csv", "org/set/files/a.csv"),
        ("/home/me/a.csv", "a.csv"),
        ("~/a.csv", "a.csv"),
        ("../data/a.csv", "a.csv"),
        ("data/a.csv", "a.csv"),
    ],
)
def test_a_local_file_is_shown_without_its_directories(source, shown):
    assert shown_name(source) == shown


def test_a_file_at_a_path_that_looks_like_a_hub_id_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/set").mkdir(parents=True)
    (tmp_path / "org/set/a.csv").touch()
    assert shown_name("org/set/a.csv") == "a.csv"
