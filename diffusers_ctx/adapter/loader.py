"""Loading, saving and pushing context adapters, for pipelines with a UNet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import CommitInfo

from ..adapter_format import (
    CONFIG_NAME,
    LORA_WEIGHTS_NAME,
    MODULE_FOLDER,
    AdapterError,
    Mode,
    public_name,
    validate_adapter_folder,
)
from ..context import ContextModule, Interventions, intervention_mask
from ..hub import push_adapter_folder, render_model_card, resolve_adapter_folder, save_model_card
from ..paths import local_or_hub, local_path
from .attention import (
    attach_context_module,
    attached_adapter,
    attached_context_module,
    check_projections,
    check_unoccupied,
    context_module_detached,
    detach_context_module,
    has_context_module,
)
from .lora import ContextLoraMixin
from .lora_layers import LORA_ADAPTER, check_unfused, lora_detached, other_loras, save_loras_of_text_encoders
from .offloading import check_no_disk_offload, on_device
from .scheduler import check_scheduler, plain_scheduler, set_context_scheduler
from .weights import adapter_config, check_base, load_attention, read_attention, save_attention


logger = logging.get_logger(__name__)


class ContextAdapterLoaderMixin(ContextLoraMixin):
    """Gives a pipeline with a `unet` and a `scheduler` the methods of a context adapter."""

    scheduler: Any
    config: Any
    _execution_device: torch.device

    @property
    def context_module(self) -> ContextModule | None:
        """The context module that is loaded, or `None`."""
        return attached_context_module(self.unet)

    @property
    def concepts(self) -> list[str]:
        """Names of the concepts that can be intervened on; empty without an adapter."""
        module = self.context_module
        return list(module.config.concepts) if module is not None else []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline, as in diffusers.

        Raises:
            OSError: if there is no such folder or repository; a mistyped folder does not wait for the network.
        """
        if kwargs.get("cache_dir"):
            kwargs["cache_dir"] = local_path(kwargs["cache_dir"])
        return super().from_pretrained(local_or_hub(pretrained_model_name_or_path), **kwargs)  # type: ignore[misc]

    def load_context_adapter(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Loads a context adapter and, in `lora` mode, its LoRAs, which act together with those that are active.

        An adapter that was trained with a noise schedule of its own replaces the pipeline's scheduler until it is
        unloaded.

        Args:
            pretrained_model_name_or_path: a local folder or the id of a repository on the Hub.
            subfolder: folder within it.
            revision: branch, tag or commit on the Hub.
            token: token for a private repository.
            cache_dir: where downloads are kept.
            local_files_only: whether to look only in the cache.

        Raises:
            AdapterError: if the folder is no complete context adapter of a known format, or does not fit the base
                model. The pipeline is then as it was before.
            ValueError: if a context adapter, an IP-Adapter or a LoRA named "context" is loaded already.
        """
        folder = resolve_adapter_folder(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = validate_adapter_folder(folder)
        check_unoccupied(self.unet)
        check_base(config, self.unet, self.scheduler.config.prediction_type)
        if config["mode"] == "lora":
            check_projections(self.unet)
        if self._context_lora_models:
            raise ValueError(
                f"A LoRA named '{LORA_ADAPTER}' is loaded already; call `delete_adapters('{LORA_ADAPTER}')` first."
            )
        module = _read_module(folder / MODULE_FOLDER)
        attach_context_module(self.unet, module, config["injection"])
        try:
            load_attention(self.unet, read_attention(folder))
            if config["mode"] == "lora":
                self._load_context_lora(folder)
            if config.get("scheduler"):
                set_context_scheduler(self, config["scheduler"])
            attached_adapter(self.unet).trained_full = config["mode"] == "full"
        except Exception:
            self.unload_context_adapter()
            raise
        own_base = Path(self.config.get("_name_or_path") or "").resolve()
        if config["mode"] == "full" and own_base != local_path(pretrained_model_name_or_path).resolve():
            logger.warning(
                f"This context adapter was trained together with its UNet; load the pipeline from"
                f" '{pretrained_model_name_or_path}' as well."
            )

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
        module, adapter = self._require_context_module(), attached_adapter(self.unet)
        check_no_disk_offload(self.unet)
        if adapter.lora_models - set(self._lora_models):
            missing = sorted(adapter.lora_models - set(self._lora_models))
            raise RuntimeError(f"The context adapter has a LoRA of {missing}, which this pipeline is without.")
        mode = mode or ("full" if adapter.trained_full else "lora" if self._context_lora_models else "frozen")
        folder = local_path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = adapter_config(
            module,
            self.unet,
            self.scheduler,
            # in mode full, the pipeline that is saved with the adapter has the schedule of training
            plain_scheduler=(None if mode == "full" else adapter.plain_scheduler) or self.scheduler,
            base_model=public_name(self.config.get("_name_or_path")),
            mode=mode,
        )
        module.save_pretrained(str(folder / MODULE_FOLDER))
        save_attention(self.unet, folder)
        (folder / LORA_WEIGHTS_NAME).unlink(missing_ok=True)  # of an adapter that was here before
        if self._context_lora_models:
            self._save_context_lora(folder)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        save_model_card(render_model_card(config, **(card or {})), folder)
        return folder

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the plain pipeline, which stock diffusers loads.

        `save_context_adapter` saves the adapter. The active LoRA of a text encoder is saved beside its weights, as in
        diffusers; `save_lora_weights` saves others. A UNet that was trained as a whole is saved with the noise
        schedule of training.

        Raises:
            ValueError: if LoRAs are fused into the weights.
        """
        folder = local_path(save_directory)
        if has_context_module(self.unet) and not (folder / CONFIG_NAME).exists():
            logger.warning(
                "The pipeline is saved without its context adapter; call `save_context_adapter` or"
                " `push_context_adapter` for that as well."
            )
        for model in self._lora_models.values():
            check_unfused(model)
        left_out = other_loras(self.unet) | save_loras_of_text_encoders(self.text_encoders, folder)
        if left_out:
            logger.warning(
                f"The pipeline is saved without the LoRAs {sorted(left_out)}; call `save_lora_weights` for them."
            )
        with ExitStack() as stack:
            stack.enter_context(plain_scheduler(self))
            stack.enter_context(context_module_detached(self.unet))
            for model in self._lora_models.values():
                stack.enter_context(lora_detached(model))
            super().save_pretrained(str(folder), **kwargs)  # type: ignore[misc]

    def unload_context_adapter(self) -> None:
        """Removes the adapter and its LoRAs, which leaves the plain pipeline; without an adapter, does nothing.

        If the adapter has its own noise schedule, the pipeline's first scheduler comes back; other pipelines that
        share the UNet keep theirs.

        Raises:
            ValueError: if its LoRA is fused into the weights.
        """
        self._check_unfused()
        scheduler = attached_adapter(self.unet).plain_scheduler
        detach_context_module(self.unet)
        if scheduler is not None:
            self.scheduler = scheduler
        self._delete_context_lora()

    def load_ip_adapter(self, *args, **kwargs) -> None:
        """Loads an IP-Adapter, as in diffusers; it cannot be combined with a context adapter.

        Raises:
            ValueError: if a context adapter is loaded.
        """
        self._check_no_context_adapter()
        super().load_ip_adapter(*args, **kwargs)  # type: ignore[misc]

    def unload_ip_adapter(self) -> None:
        """Unloads an IP-Adapter, as in diffusers.

        Raises:
            ValueError: if a context adapter is loaded: diffusers would leave half of it behind.
        """
        self._check_no_context_adapter()
        super().unload_ip_adapter()  # type: ignore[misc]

    def set_ip_adapter_scale(self, scale: float | dict | list[float | dict]) -> None:
        """Sets the scale of an IP-Adapter as in diffusers, or with a context adapter that one's, LoRAs and all.

        `IPAdapterScaleCutoffCallback` calls it.

        Raises:
            ValueError: if the context adapter cannot have the scale, see `set_context_scale`.
        """
        if has_context_module(self.unet):
            self.set_context_scale(scale)  # type: ignore[arg-type]
        else:
            super().set_ip_adapter_scale(scale)  # type: ignore[misc]

    def set_context_scale(self, scale: float) -> None:
        """Sets the adapter's scale, of its context tokens and its LoRAs alike: 1 as trained, 0 the plain model.

        A callback that sets it does so for the rest of its call, which ends with the scale that it began with.
        `set_adapters(["context", ...], [scale, ...])` sets the same scale. A UNet that was trained as a whole (mode
        `full`) stays as trained.

        Raises:
            ValueError: if no adapter is loaded, the scale is no number or negative, its tokens are in the prompt and
                the scale is neither 0 nor 1, its LoRA is fused, or it has a noise schedule of its own and the scale
                is not 1.
        """
        self._require_context_module()
        self._check_context_scale(scale)
        attached_adapter(self.unet).scale = float(scale)
        self._apply_context_scale()

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
            if attached_adapter(self.unet).trained_full:
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

    def _check_no_context_adapter(self) -> None:
        if has_context_module(self.unet):
            raise ValueError(
                "A context adapter is loaded, and an IP-Adapter would take the same place in the UNet; call"
                " `unload_context_adapter()` first."
            )

    def _mask(self, interventions: Interventions | Sequence[Interventions], num_rows: int) -> torch.Tensor:
        """The mask (num_rows, K) of interventions on this adapter's concepts."""
        config = self._require_context_module().config
        return intervention_mask(interventions, config.concepts, num_rows, config.obs_context)

    def _context_tokens(self, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, T, token_dim) of exogenous noise (B, N, d_z) under a mask (B, K)."""
        with self._context_module_on_device() as (module, device):
            return module(noise.to(device), mask.to(device))

    @contextmanager
    def _context_module_on_device(self) -> Iterator[tuple[ContextModule, torch.device]]:
        """The context module, with its weights on the pipeline's device, and that device."""
        module, device = self._require_context_module(), self._execution_device
        check_no_disk_offload(self.unet)
        self._warn_of_halves()
        with on_device(module, device):
            yield module, device

    def _require_context_module(self) -> ContextModule:
        """The context module.

        Raises:
            ValueError: if there is none.
            RuntimeError: if a part of the adapter has been removed or replaced since it was loaded.
        """
        module = self.context_module
        if module is None:
            raise ValueError("No context adapter is loaded; call `load_context_adapter(...)` first.")
        check_scheduler(self)
        if self._context_lora_models:
            check_projections(self.unet)
        if attached_adapter(self.unet).lora_models & set(self._lora_models) - set(self._context_lora_models):
            raise RuntimeError(
                "The context adapter's LoRA has been removed, as `unload_lora_weights()` does; call"
                " `unload_context_adapter()` and `load_context_adapter(...)` again."
            )
        return module


def _read_module(folder: Path) -> ContextModule:
    module, info = ContextModule.from_pretrained(folder, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise AdapterError(
            f"The weights in '{folder}' are not those of its configuration ({', '.join(sorted(wrong)[:4])}…):"
            " the adapter was saved by another version of diffusers_ctx, or its files were mixed up; save or"
            " train it again."
        )
    return module.eval()
