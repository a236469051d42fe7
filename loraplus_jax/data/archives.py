"""Extracts single members of zip and tar archives; never writes outside the target directory."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO


def extract(archive: Path, members: Mapping[str, str], directory: Path) -> None:
    """Extracts members of a zip or tar archive to paths below `directory`.

    Args:
      archive: a zip file if its name ends in `.whl` or `.zip`, otherwise a tar file.
      members: maps names in the archive to relative target paths; a name ending in "/" selects everything below it.
      directory: an existing directory.

    Raises:
      ValueError: a member is missing, is not a regular file, or would be written outside `directory`.
    """
    extracted = set()
    for name, content in _files(archive):
        for source, target in members.items():
            if name == source or (source.endswith("/") and name.startswith(source)):
                extracted.add(source)
                _write(content, directory, target + name.removeprefix(source), archive)
    if missing := sorted(set(members) - extracted):
        raise ValueError(f"{archive.name} has no regular file at {', '.join(map(repr, missing))}")


# Links and devices are skipped: one could lead what follows it out of the directory.
def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield info.filename, zipped.open(info)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            content = tarred.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content


def _write(content: IO[bytes], directory: Path, target: str, archive: Path) -> None:
    parts = PurePosixPath(target).parts
    if PurePosixPath(target).is_absolute() or ".." in parts or "\\" in target or ":" in target:
        raise ValueError(f"{archive.name}: {target!r} would be written outside the target directory")
    path = directory.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
