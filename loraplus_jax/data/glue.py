"""GLUE by name: the files, columns, labels and metrics of its tasks.

Source: Wang et al., GLUE, arXiv 1804.07461. The test splits of GLUE have no labels, so the dev split serves as the
test split, and a part of train as the validation split.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .._utils.validation import expand_path, suggest
from .fetch import from_hub
from .options import DataOptions
from .readers import Problems, read_rows
from .splits import LabelledText, labelled_texts, split_files

HUB_ID = "nyu-mll/glue"


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
      folder: directory of the task in GLUE's download; the Hub's name is its name in `GLUE`.
      texts: columns of the texts in GLUE's .tsv files.
      hub_texts: columns of the texts on the Hub, where the label is `label`.
      label: column of the label in GLUE's .tsv files.
      names: classes as GLUE writes them, in the order of the Hub's integers; empty for regression.
      metrics: GLUE's metrics; the first selects the best evaluation.
      header: columns of files without a header line.
      dev: name of the file that serves as the test split.
    """

    folder: str
    texts: tuple[str, ...] = PAIR
    hub_texts: tuple[str, ...] = PAIR
    _: dataclasses.KW_ONLY
    label: str = "label"
    names: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()
    dev: str = "dev"

    @property
    def kind(self) -> Literal["classification", "regression"]:
        """The task's name in the options."""
        return "classification" if self.names else "regression"


ONE, QUESTIONS, QUESTION = ("sentence",), ("question1", "question2"), ("question", "sentence")
MNLI = GlueTask(
    "MNLI",
    hub_texts=("premise", "hypothesis"),
    label="gold_label",
    names=("entailment", "neutral", "contradiction"),
    dev="dev_matched",
)
COLA_HEADER = ("source", "label", "mark", "sentence")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", ONE, ONE, metrics=("matthews", "accuracy"), header=COLA_HEADER),
    "sst2": GlueTask("SST-2", ONE, ONE),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), label="Quality", metrics=("f1", "accuracy")),
    "qqp": GlueTask("QQP", QUESTIONS, QUESTIONS, label="is_duplicate", metrics=("f1", "accuracy")),
    "stsb": GlueTask("STS-B", label="score", names=(), metrics=("pearson", "spearman")),
    "mnli": MNLI,
    "mnli_mismatched": dataclasses.replace(MNLI, dev="dev_mismatched"),
    "qnli": GlueTask("QNLI", QUESTION, QUESTION, names=ENTAILMENT),
    "rte": GlueTask("RTE", names=ENTAILMENT),
    "wnli": GlueTask("WNLI"),
}
UNLABELLED = ("-", "-1")
"""Labels of examples whose annotators did not agree, and of the Hub's test splits; these examples are left out."""


def find_task(options: DataOptions, kind: str | None = None) -> GlueTask | None:
    """Returns the GLUE task that `data.path` names, or None if it names a file.

    Args:
      options: the data options.
      kind: the setting `task`; None does not check it.

    Raises:
      ValueError: there is no such task, or it is of another kind.
    """
    if (name := options.glue) is None:
        return None
    if name not in GLUE:
        raise ValueError(f"data.path {options.path}: GLUE has no task {name!r}{suggest(name, GLUE)}")
    if kind not in (None, GLUE[name].kind):
        raise ValueError(
            f"data.path {options.path} is a {GLUE[name].kind} task: set task {GLUE[name].kind}, got {kind}"
        )
    return GLUE[name]


def load_glue(options: DataOptions) -> tuple[dict[str, list[LabelledText]], list[str]]:
    """Loads the splits of the task that `data.path` names, and lines to print about examples that are left out.

    Raises:
      ValueError: a file is missing or invalid (see `read_rows`), or a label is not one of the task's.
    """
    task, lines = find_task(options), []
    assert task is not None

    def load(split: str) -> list[LabelledText]:
        rows, left_out = read_glue(find_file(options, split), task)
        lines.extend(left_out)
        return rows

    files = dataclasses.replace(options, path=None, root=None, train="train", test=task.dev)
    return split_files(files, load), lines


def find_file(options: DataOptions, split: str) -> Path:
    """Returns the file of a split, such as dev_matched: GLUE's own .tsv, or the Hub's .parquet or .jsonl.

    Raises:
      ValueError: `data.root` is not a directory, or has no such file; or the download fails.
    """
    name, task = options.glue or "", find_task(options)
    assert task is not None
    # Only `dev` differs from mnli, which the Hub's mnli holds as well.
    name, hub_split = name.removesuffix("_mismatched"), split.replace("dev", "validation")
    if options.root is None:
        try:
            return from_hub("data", HUB_ID, f"{name}/{hub_split}-00000-of-00001.parquet")
        except ValueError as error:
            raise ValueError(
                f"data.path {options.path}: {error}; set data.root to a directory with GLUE's files"
            ) from error
    root = expand_path("data.root", options.root)
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a directory: set it to one that has GLUE's {task.folder}/")
    directory = next((root / x for x in (task.folder, name) if (root / x).is_dir()), None)
    if directory is None:
        listed = ", ".join(sorted(x.name for x in root.iterdir() if x.is_dir())[:20]) or "no directories"
        raise ValueError(
            f"data.root {root} has no directory {task.folder} for {options.path} (it has {listed}): set it to the "
            "directory that holds the tasks' directories"
        )
    endings = (".tsv", ".parquet", "-00000-of-00001.parquet", ".jsonl")
    files = [directory / f"{stem}{end}" for stem in dict.fromkeys((split, hub_split)) for end in endings]
    if found := next((file for file in files if file.is_file()), None):
        return found
    raise ValueError(f"{directory} has no {split}.tsv or {hub_split}.parquet: {options.path} needs it")


def read_glue(path: Path, task: GlueTask) -> tuple[list[LabelledText], list[str]]:
    """Reads labelled texts, and returns lines to print about examples that are left out.

    GLUE's own loaders leave out rows with too few fields and keep empty texts; so does this one.

    Raises:
      ValueError: the file is invalid, or a label is not one of the task's, with `file:line`.
    """
    short = Problems()
    own = path.suffix.lower() == ".tsv"
    columns = (*task.texts, task.label) if own else (*task.hub_texts, "label")
    rows = labelled_texts(_read(path, task, columns, short))
    by_label = {name: name for name in task.names} | {str(i): name for i, name in enumerate(task.names)}
    kept, problems = [], Problems()
    for row in rows:
        if row.label in UNLABELLED:
            continue
        if task.names and row.label not in by_label:
            problems.add(row.place, f"label {row.label!r} is not one of {', '.join(task.names)}")
        kept.append(dataclasses.replace(row, label=by_label.get(row.label, row.label)))
    problems.report()
    if not kept:
        raise ValueError(f"{path}: no example has a label")
    lines = []
    if short.count:
        where, _ = short.first[0]
        lines.append(f"warning: left out {short.count:,} rows with too few fields, such as {where}")
    if missing := len(rows) - len(kept):
        lines.append(f"left out {missing:,} examples without a label in {path}")
    return kept, lines


def read_glue_texts(path: Path, task: GlueTask) -> list[tuple[str, ...]]:
    """Reads the texts of each row; labels are not needed, and no row is left out."""
    texts = task.texts if path.suffix.lower() == ".tsv" else task.hub_texts
    return [values for _, values in _read(path, task, texts)]


def _read(
    path: Path, task: GlueTask, columns: Sequence[str], short_rows: Problems | None = None
) -> list[tuple[str, tuple[str, ...]]]:
    texts = {*task.texts, *task.hub_texts}
    options: Any = {"header": task.header, "may_be_empty": texts, "short_rows": short_rows}
    # GLUE's own files do not quote.
    quoting = "none" if path.suffix.lower() == ".tsv" else "minimal"
    return read_rows(path, columns, quoting=quoting, **options)
