"""Options of the data: files, columns, splits, and how texts are tokenized."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .._utils.field_types import (
    SECTION,
    Count,
    Distinct,
    Fraction,
    Index,
    Int,
    Requirement,
    Share,
    Switch,
    Text,
    check_requirements,
)

Files = Text | Annotated[tuple[Text, ...], Field(min_length=1)]
"""A data file, or several."""
EITHER = "set either path (one file, split by split_seed) or train (separate files)"
MetricName = Literal["accuracy", "f1", "macro_f1", "matthews", "mse", "mae", "pearson", "spearman"]
GLUE_SETS = ("text", "text_pair", "label", "metrics", "delimiter", "quoting", "header", "test_fraction")
"""Fields of `DataOptions` that a GLUE task brings itself."""
REQUIREMENTS: tuple[Requirement, ...] = (
    (("data.validation", "data.test"), "data.train", ()),
    (("data.test_fraction",), "data.path", ()),
    (("data.validation_fraction",), "data.validation", (None,)),
)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataOptions:
    """Data files, their columns, and how they are split.

    A file is a path, a name listed by `loraplus fetch`, or a Hub id. Formats are .csv, .tsv, .jsonl, .json
    (a list of objects) and .parquet.

    Attributes:
      path: single data file, relative to the working directory, split into train, validation and test by
        split_seed; or a GLUE task such as glue/sst2, with its own splits and columns; set this or train.
      root: directory with the files of GLUE, for a path such as glue/sst2; null downloads the task from the Hugging
        Face Hub.
      train: training file, or a list of files, if each split has its own files.
      validation: validation file, or a list; null splits off validation_fraction of train.
      test: test file, or a list (optional); only with train.
      text: column with the text (encoders).
      text_pair: column with the second text, for tasks on text pairs (encoders).
      delimiter: field delimiter of .csv and .tsv files (encoders); comma or tab if not set.
      quoting: quoting of .csv and .tsv files (encoders): minimal ("..." where a field needs it) or none (a quote is
        part of the text).
      header: names of the columns of .csv and .tsv files without a header line (encoders), such as [label, text]; a
        file whose first line has the names of text and label has one.
      label: column with the label (encoders): a class name or integer, or a number for regression.
      metrics: metrics beside the default ones, of which the first selects the best evaluation (encoders): accuracy
        (the default), macro_f1 (mean F1 of the classes), and for two classes f1 (of the second in sorted order) and
        matthews; for regression mse (the default), mae, pearson and spearman.
      max_length: sequence length in tokens, special tokens included; longer texts are truncated, longer
        multiple-choice questions are rejected.
      duplicates: if a text is in two splits, or equal texts have different labels: warn; error;
        drop, which removes these texts from train.
      validation_fraction: fraction of the distinct texts held out for validation, if there is no validation file.
      test_fraction: fraction of the distinct texts in path held out for testing; 0 makes no test split.
      split_seed: random seed for the split.
      limit: for a quick trial, maximum examples of each split, drawn after splitting; classes and the scale of
        regression labels are still those of all data.
      template: chat template (language models): model (the model's own), plain (simple headings), completion (input
        and answer, each ended by the end token; for base models) or a file.
      answers: assistant turns to train on (task instruction): all or only the last.
      packing: pack short conversations into shared rows of max_length tokens (language models); batch sizes then
        count packed rows.
      column_names: column names of the file (language models): expected name to name in the file, such as
        {prompt: question, completion: reply}.

    Raises:
      ValueError: a field is out of range, or two fields conflict; the message names them.
    """

    path: Text | None = None
    root: Text | None = None
    train: Files | None = None
    validation: Files | None = None
    test: Files | None = None
    text: Text = "text"
    text_pair: Text | None = None
    label: Text = "label"
    metrics: Annotated[tuple[MetricName, ...], Distinct] = ()
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    quoting: Literal["minimal", "none"] = "minimal"
    header: Annotated[tuple[Text, ...], Distinct] | None = None
    max_length: Annotated[Int, Field(ge=2)] = 128
    validation_fraction: Fraction = 0.1
    test_fraction: Share = 0.2
    split_seed: Index = 0
    limit: Count | None = None
    duplicates: Literal["error", "warn", "drop"] = "warn"
    template: Text = "model"
    answers: Literal["all", "last"] = "all"
    packing: Switch = False
    column_names: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.train is not None:
            raise ValueError(f"{EITHER}, got path={self.path!r} and train={self.train!r}")
        check_requirements(self, REQUIREMENTS, "data.")
        if self.split_seed and self.validation is not None and self.limit is None:
            raise ValueError(
                "data.split_seed requires data.validation null or a data.limit; it has no effect with "
                f"data.validation {self.validation}"
            )
        if self.glue is None and self.root is not None:
            raise ValueError(f"data.root requires data.path glue/TASK, such as glue/sst2, got {self.path}")
        for name in GLUE_SETS if self.glue else ():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"data.{name} has no effect with data.path {self.path}: remove it")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"text, text_pair and label must be different columns, got {self.columns}")
        if self.header is not None and not {*self.columns} <= {*self.header}:
            raise ValueError(
                f"data.header must have the columns {', '.join(self.columns)}, got {', '.join(self.header)}"
            )
        if self.path is not None and not self.glue and self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction must be below 1, to leave texts for training; "
                f"got {self.validation_fraction} + {self.test_fraction}"
            )

    @property
    def glue(self) -> str | None:
        """The task that `path` names, as in glue/sst2, if any; the name is not checked."""
        match = re.fullmatch(r"glue/([^/.]*)", self.path or "")
        return match[1] if match else None

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The data files by field: path, or train and, if set, validation and test; may be empty."""
        fields = {name: getattr(self, name) for name in ("path", "train", "validation", "test")}
        return {
            name: (value,) if isinstance(value, str) else value
            for name, value in fields.items()
            if value is not None
        }

    @property
    def sources(self) -> tuple[str, ...]:
        """The file, or files, with the training examples."""
        return next(iter(self.files.values()), ())

    @property
    def table_options(self) -> dict[str, Any]:
        """How .csv and .tsv files are written, as far as it is set: arguments of `readers.read_rows`."""
        names = ("delimiter", "quoting", "header")
        return {
            x: getattr(self, x) for x in names if getattr(self, x) != self.__dataclass_fields__[x].default
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read."""
        return tuple(c for c in (self.text, self.text_pair, self.label) if c is not None)
