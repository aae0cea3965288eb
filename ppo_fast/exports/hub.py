"""Publish a saved folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

WHOLE = ("config.json", "adapter_config.json")


def check_repo(repo_id: str) -> None:
    """Check a repository's name, without asking the hub, before a run is trained for it.

    Raises:
        ValueError: it is no name, or has no owner.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        named = repo_id.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise ValueError(f"push_to_hub: got {repo_id!r}, expected a name such as 'owner/model'")


def push_to_hub(
    folder: Path, repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Upload a folder, as ``export_policy`` and ``save_critic`` write them, and return its address.

    The repository is made if there is none; a file that it has already is replaced.

    Args:
        folder: the files.
        repo_id: "owner/name".
        private: whether a new repository is seen by its owner alone.
        token: None: that of ``hf auth login``, or of HF_TOKEN.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        ValueError: a bad name.
        RuntimeError: the hub refuses, or cannot be reached; the message says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    check_repo(repo_id)
    if not any((folder / name).is_file() for name in WHOLE):
        raise FileNotFoundError(f"push_to_hub: {folder} holds no saved model (no {WHOLE[0]})")
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload by ppo_fast")
    except OfflineModeIsEnabled as error:
        raise _failed(folder, repo_id, "HF_HUB_OFFLINE is set") from error
    except LocalTokenNotFoundError as error:
        raise _failed(folder, repo_id, "no token; run hf auth login, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        why = _line(error)
        if status in (401, 403):
            why = f"no token that may write there (HTTP {status}); run hf auth login"
        raise _failed(folder, repo_id, why) from error
    except Exception as error:  # of the libraries that huggingface_hub calls
        raise _failed(folder, repo_id, f"the hub cannot be reached ({_line(error)})") from error
    return str(url)


def _failed(folder: Path, repo_id: str, why: str) -> RuntimeError:
    return RuntimeError(f"push_to_hub: {repo_id}: {why}; the files are in {folder}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
