"""Single members of zip and tar archives, unpacked without ever writing outside the target directory."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO


def extract(archive: Path, members: Mapping[str, str], directory: Path) -> None:
    """Extracts members of a zip or tar archive to paths below `directory`.

    Args:
      archive: the file; one whose name ends in `.whl` or `.zip` is a zip, any other a tar.
      members: names in the archive to relative paths; a name that ends in "/" takes everything below it.
      directory: an existing directory.

    Raises:
      ValueError: a member is not in the archive, is not a regular file, or would lie outside `directory`.
    """
    extracted = set()
    for name, content in _files(archive):
        for source, target in members.items():
            if name == source or (source.endswith("/") and name.startswith(source)):
                extracted.add(source)
                _write(content, directory, target + name.removeprefix(source), archive)
    if absent := sorted(set(members) - extracted):
        raise ValueError(f"{archive.name} has no plain file {', '.join(map(repr, absent))}")


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the regular files of an archive with their contents, in order; skips links and devices."""
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
        raise ValueError(
            f"{archive.name} holds {target!r}, which would lie outside the directory it is unpacked to"
        )
    path = directory.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
