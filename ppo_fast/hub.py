"""Ask the hub whether it has a model or a data set, before a library asks it again and again."""

from __future__ import annotations

from typing import Literal

HUB_TIMEOUT = 10
"""Seconds to wait for the hub's answer."""


def why_not_on_hub(name: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why the hub cannot give a model or a data set; None: it may, or a copy is here."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        file = "config.json" if kind == "model" else "README.md"
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            return None
        if constants.HF_HUB_OFFLINE:
            # datasets has a cache of its own, and does not ask the hub then
            return "HF_HUB_OFFLINE is set" if kind == "model" else None
        if kind == "model":
            HfApi().model_info(name, timeout=HUB_TIMEOUT)
        else:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except HFValidationError:
        return "this is no name of the hub's"
    except GatedRepoError:
        return None
    except RepositoryNotFoundError:
        return f"the hub has no {kind} of this name that you may read"
    except HfHubHTTPError:
        return None  # it answers: from_pretrained gets the files, or says why not
    except Exception as error:  # of the libraries that huggingface_hub calls
        return f"the hub cannot be reached ({error})"
    return None
