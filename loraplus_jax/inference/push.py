"""Uploads an export to the Hugging Face Hub, without anything that says where the files were on this machine."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._utils.records import PATHS
from ..data.fetch import is_public
from .model_card import shown_name


def check_push(repository: str) -> None:
    """Checks the repository's name and that the user is logged in, before anything is exported.

    Raises:
      ValueError: the name is not ORG/NAME, or no token is stored.
    """
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid = "/" in repository
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"--push must be the Hub id of a repository, ORG/NAME, got {repository!r}")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "--push requires a login to the Hugging Face Hub; run `hf auth login` or set HF_TOKEN"
        )


def hub_base(base_model: str) -> str:
    """Returns the Hub id of the base model.

    Raises:
      ValueError: it is a path, or a name that others cannot load.
    """
    if "/" not in base_model or not is_public(base_model, "model"):
        raise ValueError(
            f"--push requires the Hub id of the base model; {base_model!r} is none: pass --base_model ORG/NAME"
        )
    return base_model


def public_settings(settings: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """Returns a run's settings as plain values with `base_model` as the model, and without local directories."""

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return shown_name(value)
        return None if value is None else [shown_name(name) for name in value]

    data = {
        name: shown(value) if name in (*PATHS["data"], "template") else value
        for name, value in settings["data"].items()
    }
    return {
        **settings,
        "model": {**settings["model"], "path": base_model},
        "data": data,
        "init_adapter": shown(settings.get("init_adapter")),
        "distributed": {},  # addresses of machines
    }


def push(directory: Path, repository: str, *, public: bool) -> str:
    """Uploads a directory as one commit, into a new repository or an existing one; returns its address.

    Args:
      directory: the directory.
      repository: `ORG/NAME`.
      public: whether a new repository is public; an existing one keeps its visibility.

    Raises:
      ValueError: the upload failed; the message does not contain the token.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="loraplus_jax", library_version=version("loraplus_jax"))
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload from loraplus_jax"
        )
    # The hub client passes on exceptions of its HTTP library, which share no base class.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        # Such as that of a header with characters that HTTP does not allow.
        reason = reason.replace(huggingface_hub.get_token() or "\0", "***")
        raise ValueError(f"cannot push to {repository}: {reason}") from None
    return str(url)
