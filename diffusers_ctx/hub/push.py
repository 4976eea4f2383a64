"""Pushes an adapter to the Hub, without the other files in its folder."""

from __future__ import annotations

import glob
import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from ..adapter_format import (
    CARD_NAME,
    LIBRARY,
    LORA_WEIGHTS_NAME,
    RECORD_NAME,
    AdapterError,
    adapter_files,
    validate_adapter_folder,
)
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
        PermissionError: if the Hub does not accept the token.
        ConnectionError: if the Hub cannot be reached.
    """
    files = files_to_push(folder)
    api = _api(token)
    repo_id = _create(api, repo_id, private)  # a pull request needs no right to write
    with _refused(repo_id):
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
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
        ConnectionError: if the Hub cannot be reached.
    """
    api = _api(token)
    name = _create(api, repo_id, private)
    if "write" in inspect.signature(api.auth_check).parameters:  # older versions cannot ask
        with _refused(repo_id):  # an existing repository may be read-only for this token
            api.auth_check(name, write=True)
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
    with _refused(repo_id):
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id


@contextmanager
def _refused(repo_id: str) -> Iterator[None]:
    """Raises errors that name the fix if the Hub refuses the token or cannot be reached."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(f"The Hub does not let this token write to {repo_id}. {_LOGIN}.") from error
    except (HTTPError, OSError) as error:  # versions of the client use different HTTP libraries
        raise ConnectionError(f"The Hub was not reached ({error}). Push to {repo_id} again while online.") from error


def _api(token: str | None) -> HfApi:
    token = token or get_token()
    if not token:
        raise LocalTokenNotFoundError(f"Pushing to the Hub takes an access token. {_LOGIN}.")
    return HfApi(token=token, library_name=LIBRARY)
