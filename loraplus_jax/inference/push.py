"""Uploads an export to the Hugging Face Hub, without anything that says where the files were on this machine."""

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.fetch import is_public
from ..interop.peft_files import NOTES_FILE, OPTIONS, OWN_TENSORS_FILE, WEIGHTS
from ..models.checkpoints.hub_directory import TOKENIZER_FILES
from ..settings.schema import PATH_FIELDS
from .model_card import shown_name

EXPORTED = (
    *("README.md", NOTES_FILE, OWN_TENSORS_FILE, OPTIONS, WEIGHTS, "config.json", "model.gguf"),
    *("adapter.gguf", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *TOKENIZER_FILES,
)
"""Patterns of the names of all files that exports write."""


def check_push(repository: str) -> None:
    """Checks the repository's name and that the user is logged in, before anything is exported.

    Raises:
      ValueError: the name is not ORG/NAME, or no token is stored.
    """
    import huggingface_hub

    if not _is_hub_id(repository):
        raise ValueError(f"--push must be the Hub id of a repository, ORG/NAME, got {repository!r}")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "--push requires a login to the Hugging Face Hub; run `hf auth login` or set HF_TOKEN"
        )


def hub_base(named: str | None, path: str) -> str:
    """Returns the Hub id of the base model: the one that the user names, or else the run's `path`.

    Raises:
      ValueError: it is a path, or a name that others cannot load.
    """
    # A directory here may have a Hub id as its name; only the user knows that it holds the same model.
    if not _is_hub_id(named or path) or (named is None and not is_public(path, "model")):
        raise ValueError(
            f"--push requires the Hub id of the base model; {named or path!r} is a local path or another name: "
            "pass --base_model ORG/NAME"
        )
    return named or path


def public_settings(settings: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """Returns a run's settings as plain values with `base_model` as the model, and without local directories."""

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return shown_name(value)
        return None if value is None else [shown_name(name) for name in value]

    data = {
        name: shown(value) if f"data.{name}" in PATH_FIELDS else value
        for name, value in settings["data"].items()
    }
    return {
        **settings,
        "model": {**settings["model"], "path": base_model},
        "data": data,
        "init_adapter": shown(settings.get("init_adapter")),
        "distributed": {},  # addresses of machines
    }


def open_repository(repository: str, *, public: bool) -> list[str]:
    """Creates a repository unless it exists; returns the names of its files, which an upload may replace.

    Args:
      repository: `ORG/NAME`.
      public: whether it is public.

    Raises:
      ValueError: it can be neither created nor read, has the other visibility, or holds what is no export.
    """
    with _one_line(repository) as api:
        api.create_repo(repository, private=not public, exist_ok=True)
        info = api.repo_info(repository)
    if bool(info.private) == public:
        has, fix = ("private", "leave out --public") if public else ("public", "add --public")
        raise ValueError(f"{repository} is {has}: {fix}, or choose another name")
    files = sorted({file.rfilename for file in info.siblings or ()} - {".gitattributes"})
    # Weights without notes are not from here, whatever their names.
    ours = EXPORTED if NOTES_FILE in files else ("README.md",)
    if foreign := [name for name in files if not any(fnmatchcase(name, pattern) for pattern in ours)]:
        raise ValueError(
            f"{repository} holds files that are not from an export: {', '.join(foreign[:5])}"
            f"{', ...' if len(foreign) > 5 else ''}; choose another name, or delete them"
        )
    return files


def push(directory: Path, repository: str, existing: list[str]) -> str:
    """Uploads a directory in place of a repository's existing files; returns the repository's address.

    Args:
      directory: the directory.
      repository: `ORG/NAME`, from `open_repository`.
      existing: what that returned.

    Raises:
      ValueError: the upload failed; the message does not contain the token.
    """
    with _one_line(repository) as api:
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Upload from loraplus_jax",
            delete_patterns=existing,
        )
    return f"{api.endpoint}/{repository}"


@contextlib.contextmanager
def _one_line(repository: str) -> Iterator[Any]:
    """A client of the Hub; its errors become one line without the token."""
    import huggingface_hub

    try:
        yield huggingface_hub.HfApi(library_name="loraplus_jax", library_version=version("loraplus_jax"))
    # The hub client passes on exceptions of its HTTP library, which share no base class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        # Such as that of a header with characters that HTTP does not allow.
        reason = reason.replace(huggingface_hub.get_token() or "\0", "***")
        raise ValueError(f"cannot push to {repository}: {reason}") from None


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
