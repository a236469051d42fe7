"""`benchmarks/performance.py`: the committed page is what the JSON files give."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_committed_page_is_what_the_json_files_give(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from performance import PICTURES, SECTIONS, page, read

    files = read()
    assert (REPOSITORY / "docs/performance.md").read_text(encoding="utf-8") == page(files)
    drawn = {s.picture.name for s in SECTIONS if s.draw is not None and s.file in files}
    assert {path.name for path in PICTURES.glob("*.png")} == drawn
