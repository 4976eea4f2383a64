"""Pushes an adapter to the Hub, without the other files in its folder."""

from __future__ import annotations

import glob
import inspect
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any
from urllib.parse import unquote

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from ..adapter_format import (
    CARD_NAME,
    LIBRARY,
    LORA_WEIGHTS_NAME,
    RECORD_NAME,
    AdapterError,
    adapter_files,
    validate_adapter_folder,
)
from ..paths import local_path
from .model_card import is_public


logger = logging.getLogger(__name__)

_LOGIN = "Log in with `hf auth login`, or pass a token that may write (`--hub_token` on the command line)"
_PICTURE = re.compile(r"!\[.*?\]\(\s*<?([^)\s>]+)")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def push_adapter_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload context adapter",
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads the adapter in `folder`, its model card and the pictures that the card shows, as one commit.

    The options of its training (`training_config.json`) are uploaded too, unless they have an absolute path or an
    access token. For an adapter of mode `full`, so is its pipeline.

    Args:
        folder: an adapter's folder; checkpoints, logs and other files in it are not uploaded.
        repo_id: repository to upload to, created if need be; without a namespace, in that of the token's owner.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        private: whether a new repository is private; by default its owner's setting.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing to the main branch.

    Returns:
        The commit, with its address.

    Raises:
        AdapterError: if the folder is not a whole adapter with a model card, a picture of the card is missing, or the
            pipeline of an adapter of mode `full` is.
        LocalTokenNotFoundError: if there is no token.
        PermissionError: if the Hub does not accept the token; with the command that completes the upload.
        ConnectionError: if the upload breaks off, or the Hub refuses it; with that command, too.
    """
    folder = local_path(folder)
    files = files_to_push(folder)
    api = _api(token)
    again = _command(folder, repo_id, private=private, commit_message=commit_message, create_pr=create_pr)
    with _push_errors(repo_id, f"All is saved in {folder}; complete the push with\n    {again}"):
        repo_id = _create(api, repo_id, private)  # a pull request needs no right to write
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            # files of an earlier push that this adapter does not have; uploaded files stay
            delete_patterns=[LORA_WEIGHTS_NAME, RECORD_NAME],
            commit_message=commit_message,
            create_pr=create_pr,
        )


def create_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes sure that the repository exists and that the token may write to it.

    Args:
        repo_id: its name; without a namespace, in that of the token's owner.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        private: whether a new repository is private; by default its owner's setting.

    Returns:
        Its full name.

    Raises:
        LocalTokenNotFoundError: if there is no token.
        PermissionError: if the Hub does not accept the token, or the token may not write there.
        ConnectionError: if the Hub cannot be reached, or refuses the repository.
    """
    api = _api(token)
    with _push_errors(repo_id, f"Nothing was pushed to {repo_id}; try again."):
        name = _create(api, repo_id, private)
        if "write" in inspect.signature(api.auth_check).parameters:  # older versions cannot ask
            api.auth_check(name, write=True)  # an existing repository may be read-only for this token
    return name


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Names of the files that a push uploads, relative to `folder`.

    Raises:
        AdapterError: if the folder is not a whole adapter with a model card, a picture of the card is missing, or the
            pipeline of an adapter of mode `full` is.
    """
    config = validate_adapter_folder(folder)
    card = Path(folder) / CARD_NAME
    if not card.is_file():
        raise AdapterError(f"There is no {card}: write the model card first, with `render_model_card`.")
    pipeline = _pipeline_files(Path(folder)) if config["mode"] == "full" else []
    return [*adapter_files(config), *pipeline, CARD_NAME, *_record(Path(folder)), *_pictures(card)]


def _pipeline_files(folder: Path) -> list[str]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise AdapterError(
            f"There is no {index}: an adapter of mode full needs its own pipeline. Save that in {folder} too, with "
            "`pipe.save_pretrained`."
        )
    components = [folder / name for name in json.loads(index.read_text(encoding="utf-8"))]
    files = [path for component in components for path in sorted(component.rglob("*")) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in (index, *files)]


def _record(folder: Path) -> list[str]:
    """The options of the training run, if they exist and may be published."""
    file = folder / RECORD_NAME
    if not file.is_file():
        return []
    if is_public(json.loads(file.read_text(encoding="utf-8"))):
        return [RECORD_NAME]
    logger.warning(f"{file} is not pushed: it names folders of this machine, or holds an access token.")
    return []


def _pictures(card: Path) -> list[str]:
    targets = [target for target in _PICTURE.findall(card.read_text(encoding="utf-8")) if "://" not in target]
    pictures = [PurePosixPath(unquote(target)) for target in targets]
    for picture in pictures:
        inside = not picture.is_absolute() and ".." not in picture.parts
        if not (inside and picture.suffix.lower() in _PICTURE_SUFFIXES and (card.parent / picture).is_file()):
            raise AdapterError(
                f"{card} shows {picture}, which is no picture in {card.parent}: put it there or take it off the card."
            )
    return [picture.as_posix() for picture in pictures]


def _create(api: HfApi, repo_id: str, private: bool | None) -> str:
    return api.create_repo(repo_id, private=private, exist_ok=True).repo_id


@contextmanager
def _push_errors(repo_id: str, fix: str) -> Iterator[None]:
    """Raises errors that end with the fix if the Hub cannot be reached, or refuses what it is sent."""
    try:
        yield
    except HFValidationError:  # it is no name of a repository: nothing was sent
        raise
    except Exception as error:  # its type depends on the client's version, the kind of file and the cause
        refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(refusal, HfHubHTTPError) and refusal.response.status_code in (401, 403):
            raise PermissionError(f"The Hub does not let this token write to {repo_id}. {_LOGIN}. {fix}") from error
        reason = shorten(" ".join(str(part) for part in (error, error.__cause__) if part), 300)
        raise ConnectionError(f"Pushing to {repo_id} failed ({reason}). {fix}") from error


def _command(folder: Path, repo_id: str, **options: Any) -> str:
    """What pushes the folder, from a shell in any folder, with the options that are not the defaults."""
    defaults = inspect.signature(push_adapter_folder).parameters
    given = [f"{name}={value!r}" for name, value in options.items() if value != defaults[name].default]
    call = f"push_adapter_folder({', '.join([repr(str(folder.resolve())), repr(repo_id), *given])})"
    return f"python -c {shlex.quote(f'from diffusers_ctx.hub import push_adapter_folder; {call}')}"


def _api(token: str | None) -> HfApi:
    token = token or get_token()
    if not token:
        raise LocalTokenNotFoundError(f"Pushing to the Hub takes an access token. {_LOGIN}.")
    return HfApi(token=token, library_name=LIBRARY)
