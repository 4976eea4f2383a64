"""Finds an adapter's folder, on disk or on the Hub."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..adapter_format import CARD_NAME, CONFIG_NAME, AdapterError, adapter_files, read_adapter_config
from ..embedded import embedded_adapters
from ..paths import local_or_hub, local_path


def resolve_adapter_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path:
    """The local folder of an adapter, which is downloaded from the Hub if need be.

    The config is downloaded and checked first, and then only the files of an adapter.

    Args:
        name_or_path: a local folder, which takes precedence as in diffusers, or a repository on the Hub.
        revision: branch, tag or commit on the Hub.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        cache_dir: folder of the Hub's cache.
        local_files_only: look only in the cache.
        subfolder: folder of the adapter within the folder or repository.

    Raises:
        AdapterError: if there is no such folder, repository or revision, if the Hub cannot be reached and the cache
            does not hold the adapter, or if its config is not that of a context adapter.
    """
    try:
        repo_id = local_or_hub(name_or_path, has_owner=True)
    except NotADirectoryError as error:
        raise AdapterError(
            f"{name_or_path} is a file: pass the adapter's folder, the one that holds {CONFIG_NAME}."
        ) from error
    except FileNotFoundError as error:
        calls = " or ".join(f'`embedded_adapter("{name}")`' for name in embedded_adapters())
        is_path = os.sep in os.fspath(name_or_path)
        hint = "" if is_path else f" For an adapter that comes with the library, pass {calls}."
        raise AdapterError(f"{error}{hint}") from error
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if Path(repo_id).is_dir():
        return Path(repo_id) / (subfolder or "")
    prefix = f"{subfolder}/" if subfolder else ""
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": local_path(cache_dir) if cache_dir else None,
        "local_files_only": local_files_only,
    }
    try:
        config = read_adapter_config(Path(hf_hub_download(repo_id, prefix + CONFIG_NAME, **options)).parent)
        names = [prefix + name for name in (*adapter_files(config), CARD_NAME)]
        snapshot = snapshot_download(repo_id, allow_patterns=[glob.escape(name) for name in names], **options)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise AdapterError(
            f"{repo_id!r} is neither a local folder nor a repository on the Hub that you may read. Check the name; if "
            "the repository is private or gated, log in with `hf auth login` or pass `token`."
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{repo_id} has no revision {revision!r}: pass a branch, tag or commit of it.") from error
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{repo_id!r} is no local folder, the Hub was not reached, and the cache does not hold the whole adapter. "
            "Check the name, or load it once while online."
        ) from error
    except EntryNotFoundError as error:
        raise AdapterError(
            f"{repo_id} holds no {prefix}{CONFIG_NAME}, so it is no context adapter: check the name, `revision` and "
            "`subfolder`."
        ) from error
    except HfHubHTTPError as error:
        raise AdapterError(f"The Hub did not hand out {repo_id}: {error}") from error
    return Path(snapshot) / prefix
