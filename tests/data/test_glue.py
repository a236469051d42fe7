"""GLUE's tasks in files of GLUE's layout, quirks included: no header, a byte order mark, quotes, index columns."""

import huggingface_hub
import pytest

from loraplus_jax.data.glue import (
    GLUE,
    UNLABELLED,
    find_task,
    load_glue,
    read_glue,
    read_glue_texts,
)
from loraplus_jax.data.options import DataOptions

from ..messages import mentions
from ..refusals import refusals

# The header of train and dev in GLUE's download, and a row of it; {n} is the row's number, {label} its label.
LINES = {
    "cola": (None, 'gj04\t{label}\t*\tThe {n} book "fell.'),
    "sst2": ("sentence\tlabel", 'a "{n} film \t{label}'),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '{label}\t7\t7\t" He said {n} .\tHe {n} " .',
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{n}\t3\t4\tWhy {n}?\tWhat {n}?\t{label}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        'i\tg\tf\ty\to\tnone\tnone\tA "man {n}.\tA boy {n}.\t{label}',
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "{n}\t1\t1n\tfiction\tHe {n}.\tShe {n}.\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", '{n}\tWho {n}?\t"Anne {n}.\t{label}'),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{n}\tIt {n}.\tNot {n}.\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{n}\tIt {n}.\tNot {n}.\t{label}"),
}
# First text, second text and label of row 0, by hand.
FIRST = {
    "cola": ('The 0 book "fell.', None, "0"),
    "sst2": ('a "0 film ', None, "0"),
    "mrpc": ('" He said 0 .', 'He 0 " .', "0"),
    "qqp": ("Why 0?", "What 0?", "0"),
    "stsb": ('A "man 0.', "A boy 0.", "0.000"),
    "mnli": ("He 0.", "She 0.", "entailment"),
    "qnli": ("Who 0?", '"Anne 0.', "entailment"),
    "rte": ("It 0.", "Not 0.", "entailment"),
    "wnli": ("It 0.", "Not 0.", "0"),
}


def label(name, number):
    names = GLUE[name].names
    return names[number % len(names)] if names else f"{number % 6}.000"


def write(root, name, split, rows):
    """Writes a split of 'rows' rows, or of these lines."""
    header, line = LINES[name]
    lines = [line.format(n=n, label=label(name, n)) for n in range(rows)] if isinstance(rows, int) else rows
    directory = root / GLUE[name].folder
    directory.mkdir(exist_ok=True, parents=True)
    (directory / f"{split}.tsv").write_text(
        "\n".join([*([header] if header else []), *lines]) + "\n", "utf-8"
    )


def settings(root, name, **others):
    return DataOptions(path=f"glue/{name}", root=None if root is None else str(root), **others)


@pytest.mark.parametrize("name", LINES)
def test_the_splits_of_every_task(tmp_path, name):
    write(tmp_path, name, "train", 40)
    write(tmp_path, name, GLUE[name].dev, 7)
    splits, lines = load_glue(settings(tmp_path, name))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 36, "validation": 4, "test": 7}
    first = splits["test"][0]
    assert (first.prompt, first.pair, first.label) == FIRST[name]
    assert first.place.endswith("tsv:1" if name == "cola" else "tsv:2")
    assert lines == []
    again, _ = load_glue(settings(tmp_path, name))
    assert again["validation"] == splits["validation"]


def test_mismatched_is_another_test_split_of_the_same_task(tmp_path):
    write(tmp_path, "mnli", "train", 40)
    write(tmp_path, "mnli", "dev_matched", 7)
    write(tmp_path, "mnli", "dev_mismatched", 9)
    matched, _ = load_glue(settings(tmp_path, "mnli"))
    mismatched, _ = load_glue(settings(tmp_path, "mnli_mismatched"))
    assert (len(matched["test"]), len(mismatched["test"])) == (7, 9)
    assert matched["train"] == mismatched["train"]


def test_texts_with_and_without_a_header_and_labels(tmp_path):
    write(tmp_path, "cola", "dev", 3)
    (tmp_path / "CoLA/test.tsv").write_text('\ufeffindex\tsentence\r\n0\tA "book.\r\n1\t\r\n')
    texts = [read_glue_texts(tmp_path / f"CoLA/{split}.tsv", GLUE["cola"]) for split in ("dev", "test")]
    assert texts == [[(f'The {n} book "fell.',) for n in range(3)], [('A "book.',), ("",)]]


def test_rows_that_glues_loaders_leave_out_are_counted(tmp_path):
    _, line = LINES["qqp"]
    full = [line.format(n=n, label=n % 2) for n in range(20)]
    write(tmp_path, "qqp", "train", [*full, "21\t3\t4\tbroken in", "two?\tWhat?\t1", "22\t3\t4\t\tempty?\t1"])
    write(tmp_path, "qqp", "dev", 4)
    splits, lines = load_glue(settings(tmp_path, "qqp"))
    assert len(splits["train"]) + len(splits["validation"]) == 21
    assert "" in [row.prompt for rows in splits.values() for row in rows]
    (line,) = lines
    assert all(word in line for word in ("warning", "2 rows", "train.tsv:22"))


def test_examples_without_a_label_are_left_out(tmp_path):
    _, line = LINES["mnli"]
    labels = ["-", "neutral", "entailment", "-", "contradiction"]
    lines = [line.format(n=n, label=label) for n, label in enumerate(labels)]
    write(tmp_path, "mnli", "dev_matched", lines)
    rows, (said,) = read_glue(tmp_path / "MNLI/dev_matched.tsv", GLUE["mnli"])
    assert [row.label for row in rows] == ["neutral", "entailment", "contradiction"]
    assert "2 examples" in said
    assert "-" in UNLABELLED


def hub_rows(name, count):
    """Rows as the Hub has them: classes as integers."""
    task = GLUE[name]
    texts = [{column: f"{column} {n}" for column in task.hub_texts} for n in range(count)]
    classes = max(len(task.names), 1)
    return [row | {"label": n % classes if task.names else n / 2, "idx": n} for n, row in enumerate(texts)]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("mnli", ["entailment", "neutral", "contradiction"]),
        ("mrpc", ["0", "1", "0"]),
        ("stsb", ["0", "0.5", "1"]),
    ],
)
def test_parquet_files_of_the_hub(tmp_path, name, labels):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / name).mkdir()
    hub_dev = GLUE[name].dev.replace("dev", "validation")
    for split, count in {"train": 20, hub_dev: 5}.items():
        table = pyarrow.Table.from_pylist(hub_rows(name, count))
        parquet.write_table(table, tmp_path / name / f"{split}-00000-of-00001.parquet")
    splits, _ = load_glue(settings(tmp_path, name))
    test = splits["test"]
    assert [row.label for row in test[:3]] == labels
    assert test[1].prompt == f"{GLUE[name].hub_texts[0]} 1"
    assert test[1].place.endswith("parquet: item 2")
    table = pyarrow.Table.from_pylist([{"sentence": "a", "labels": 1}])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=mentions("a.parquet", "'label'", "'labels'")):
        read_glue(tmp_path / "a.parquet", GLUE["sst2"])


def test_the_hub_is_asked_for_the_files_of_a_task(tmp_path, monkeypatch):
    pyarrow, parquet, asked = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet"), []

    def download(repository, file, **options):
        asked.append((repository, file, options))
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows("mnli", 20)), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    splits, _ = load_glue(settings(None, "mnli_mismatched"))
    files = [f"mnli/{split}-00000-of-00001.parquet" for split in ("train", "validation_mismatched")]
    assert asked == [("nyu-mll/glue", file, {"repo_type": "dataset"}) for file in files]
    assert [row.label for row in splits["test"][:3]] == ["entailment", "neutral", "contradiction"]
    assert splits["test"][3].pair == "hypothesis 3"


def test_without_files_the_error_says_why_and_how_to_get_them(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(ValueError, match=mentions("glue/rte", "data.root", "nyu-mll/glue", "no network")):
        load_glue(settings(None, "rte"))


def test_a_task_is_found_by_its_path():
    assert find_task(settings(None, "stsb"), "regression") is GLUE["stsb"]
    assert find_task(DataOptions(path="glue/own.csv")) is None


def test_directories_and_files_that_do_not_fit(tmp_path):
    write(tmp_path, "cola", "train", 40)
    with pytest.raises(ValueError, match=mentions("data.root", tmp_path / "x")):
        load_glue(settings(tmp_path / "x", "cola"))
    with pytest.raises(ValueError, match=mentions("data.root", tmp_path, "RTE", "glue/rte", "CoLA")):
        load_glue(settings(tmp_path, "rte"))
    with pytest.raises(ValueError, match=mentions(tmp_path / "CoLA", "dev.tsv", "validation.parquet")):
        load_glue(settings(tmp_path, "cola"))
    (tmp_path / "CoLA").rename(tmp_path / "RTE")
    with pytest.raises(ValueError, match=mentions("RTE/train.tsv:1", "'sentence1'")):
        load_glue(settings(tmp_path, "rte"))


def file_of(text, name="cola", file="train.tsv", read=read_glue):
    def call(tmp_path):
        (tmp_path / file).write_text(text)
        read(tmp_path / file, GLUE[name])

    return call


test_tasks_and_rows_that_do_not_fit = refusals(
    (lambda: find_task(settings(None, "sst3")), "glue/sst3", "'sst2'"),
    (
        lambda: find_task(settings(None, "stsb"), "classification"),
        *("glue/stsb", "task regression", "classification"),
    ),
    (file_of("a good film\t1\n"), "train.tsv:1", "2 fields", 4),
    (file_of("index\ta\tb\tlabel\n0\tIt 0.\tNot 0.\tentailment\n"), "train.tsv:2", "'It 0.'", 0, 1),
    (file_of("a\t1\t\tGood.\na\t2\t*\tBad.\n"), "train.tsv:2", "'2'", 0, 1),
    (file_of("sentence,label\nA film.,-1\n", "sst2", "a.csv"), "a.csv", "no example has a label"),
    (file_of("index\tsentence\n0\tA.\n1\n", file="test.tsv", read=read_glue_texts), "test.tsv:3", "1 fields"),
    lines=4,
)


def test_csv_files_quote(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('sentence,label\n"A great, ""long"" film.",1\n')
    assert read_glue(path, GLUE["sst2"])[0][0].prompt == 'A great, "long" film.'
    assert read_glue_texts(path, GLUE["sst2"]) == [('A great, "long" film.',)]
