"""Tables of texts as files."""

import csv
from pathlib import Path


def write_table(path: Path, rows, header=("id", "text", "label"), newline="\n", encoding="utf-8") -> Path:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, dialect, lineterminator=newline).writerows([header, *rows])
    return path
