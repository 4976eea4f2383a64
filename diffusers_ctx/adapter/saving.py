"""Saving and pushing context adapters, and saving pipelines that have one."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from diffusers.utils import logging
from huggingface_hub import CommitInfo

from ..adapter_format import ADAPTER_FOLDER, CONFIG_NAME, LORA_WEIGHTS_NAME, MODULE_FOLDER, Mode, public_name
from ..hub import push_adapter_folder, render_model_card, save_model_card
from ..paths import local_path
from .loader import SAVED_ADAPTER, ContextAdapterLoaderMixin
from .lora_layers import check_unfused, lora_detached, other_loras
from .offloading import check_no_disk_offload
from .scheduler import plain_scheduler
from .text_encoders import save_loras_of_text_encoders, text_encoders_of
from .weights import adapter_config, save_attention


logger = logging.get_logger(__name__)


class ContextAdapterMixin(ContextAdapterLoaderMixin):
    """All methods of a pipeline that concern its context adapter: saving and pushing, and those of the base class."""

    _is_saved_with_adapter = False  # while `save_pretrained` runs

    def save_context_adapter(
        self, save_directory: str | os.PathLike, *, mode: Mode | None = None, card: dict[str, Any] | None = None
    ) -> Path:
        """Saves the loaded adapter, with its LoRA if it has one, and a model card.

        With an adapter of mode `full`, save the pipeline too, by `save_pretrained`.

        Args:
            save_directory: folder to write to; created if missing.
            mode: how the adapter was trained; by default inferred from what is loaded.
            card: further arguments of [`~hub.render_model_card`], such as `results` and `training`.

        Raises:
            ValueError: if no adapter is loaded, or its weights are offloaded to disk.
            RuntimeError: if a part of it has been removed or replaced since it was loaded.
        """
        module, backbone = self._require_context_module(), self._backbone
        adapter = backbone.adapter
        check_no_disk_offload(backbone.model)
        if adapter.lora_models - set(self._lora_models):
            missing = sorted(adapter.lora_models - set(self._lora_models))
            raise RuntimeError(f"The context adapter has a LoRA of {missing}, which this pipeline is without.")
        mode = mode or ("full" if adapter.trained_full else "lora" if self._context_lora_models else "frozen")
        folder = local_path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = adapter_config(
            module,
            backbone,
            self.scheduler,
            # in mode full, the pipeline that is saved with the adapter has the schedule of training
            plain_scheduler=(None if mode == "full" else adapter.plain_scheduler) or self.scheduler,
            base_model=public_name(self.config.get("_name_or_path")),
            mode=mode,
        )
        module.save_pretrained(str(folder / MODULE_FOLDER))
        save_attention(backbone, folder)
        (folder / LORA_WEIGHTS_NAME).unlink(missing_ok=True)  # of an adapter that was here before
        if self._context_lora_models:
            self._save_context_lora(folder)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        save_model_card(render_model_card(config, **(card or {})), folder)
        return folder

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, context_adapter: bool = False, **kwargs: Any
    ) -> None:
        """Saves the plain pipeline, which stock diffusers loads, and on request the context adapter with it.

        The active LoRA of a text encoder is saved beside its weights, as in diffusers; `save_lora_weights` saves
        others. A backbone that was trained as a whole is saved with the noise schedule of training.

        Args:
            save_directory: folder to write to; created if missing.
            context_adapter: whether to save the adapter too, in a folder of its own within the pipeline's.
                `from_pretrained` of this library's pipelines then loads both, and stock diffusers the plain pipeline.
                `save_context_adapter` saves the adapter alone.
            kwargs: arguments of diffusers, such as `variant`, or `push_to_hub=True` and `repo_id`.

        Raises:
            ValueError: if LoRAs are fused into the weights, or no adapter is loaded and one is to be saved.
            RuntimeError: if a part of the adapter that is to be saved has been removed or replaced.
        """
        folder, backbone = local_path(save_directory), self._backbone
        for model in self._lora_models.values():
            check_unfused(model)
        if context_adapter:
            self.save_context_adapter(folder / ADAPTER_FOLDER, card={"within_pipeline": True})
        elif backbone.has_context_module and not (folder / CONFIG_NAME).exists():
            logger.warning(
                "The pipeline is saved without its context adapter; pass `context_adapter=True` to save both, or call"
                " `save_context_adapter` or `push_context_adapter` for the adapter."
            )
        left_out = other_loras(backbone.model) | save_loras_of_text_encoders(text_encoders_of(self.components), folder)
        if left_out:
            logger.warning(
                f"The pipeline is saved without the LoRAs {sorted(left_out)}; call `save_lora_weights` for them."
            )
        with ExitStack() as stack:
            stack.enter_context(plain_scheduler(self))
            stack.enter_context(backbone.detached())
            for model in self._lora_models.values():
                stack.enter_context(lora_detached(model))
            self._is_saved_with_adapter = context_adapter
            stack.callback(setattr, self, "_is_saved_with_adapter", False)
            super().save_pretrained(str(folder), **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The config as it is saved: it says where an adapter is that is saved with it."""
        config = super().to_json_string()  # type: ignore[misc]
        if not self._is_saved_with_adapter:
            return config
        # stock diffusers ignores names that begin with an underscore
        return json.dumps(json.loads(config) | {SAVED_ADAPTER: ADAPTER_FOLDER}, indent=2, sort_keys=True) + "\n"

    def push_context_adapter(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload context adapter",
        create_pr: bool = False,
        card: dict[str, Any] | None = None,
    ) -> CommitInfo:
        """Saves the loaded adapter, in mode `full` with its pipeline, and pushes it to the Hub.

        Args:
            repo_id: repository to push to; created if missing.
            token: token with write access; the one of `hf auth login` by default.
            private: whether a new repository is private.
            commit_message: message of the commit.
            create_pr: whether to open a pull request.
            card: further arguments of the model card, see `save_context_adapter`.

        Raises:
            ValueError: if no adapter is loaded.
            LocalTokenNotFoundError: if there is no token.
            PermissionError, ConnectionError: if the Hub does not accept the token, refuses the adapter, or cannot be
                reached. What was saved stays on disk then; the message says where, and how to complete the push.
        """
        with ExitStack() as stack:
            folder = mkdtemp(prefix="context-adapter-")
            stack.callback(shutil.rmtree, folder)
            self.save_context_adapter(folder, card={"repo_id": repo_id} | (card or {}))
            if self._backbone.adapter.trained_full:
                self.save_pretrained(folder)
            try:
                return push_adapter_folder(
                    folder,
                    repo_id,
                    token=token,
                    private=private,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
            except (PermissionError, ConnectionError):
                stack.pop_all()
                raise
