"""Loading, saving and pushing context adapters, for pipelines with a UNet."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.utils import logging
from huggingface_hub import CommitInfo

from ..adapter_format import (
    CONFIG_NAME,
    LORA_WEIGHTS_NAME,
    MODULE_FOLDER,
    AdapterError,
    public_name,
    validate_adapter_folder,
)
from ..context import ContextModule
from ..hub import push_adapter_folder, render_model_card, resolve_adapter_folder, save_model_card
from .attention import (
    attach_context_module,
    attached_adapter,
    attached_context_module,
    check_no_disk_offload,
    check_unoccupied,
    context_module_detached,
    detach_context_module,
    has_context_module,
    lora_detached,
    set_context_scale,
)
from .lora import LORA_ADAPTER, ContextLoraMixin
from .weights import adapter_config, check_base, load_attention, read_attention, save_attention


logger = logging.get_logger(__name__)


class ContextAdapterLoaderMixin(ContextLoraMixin):
    """Gives a pipeline with a `unet` and a `scheduler` the methods of a context adapter."""

    scheduler: Any
    config: Any

    @property
    def context_module(self) -> ContextModule | None:
        """The context module that is loaded, or `None`."""
        return attached_context_module(self.unet)

    @property
    def concepts(self) -> list[str]:
        """Names of the concepts that can be intervened on; empty without an adapter."""
        module = self.context_module
        return list(module.config.concepts) if module is not None else []

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
        """Loads a context adapter, in `lora` mode together with its LoRAs, which act beside those that are active.

        An adapter that was trained with another noise schedule than its base model's brings it along: the pipeline's
        scheduler is replaced until the adapter is unloaded.

        Args:
            pretrained_model_name_or_path: a local folder or the id of a repository on the Hub.
            subfolder: folder within it.
            revision: branch, tag or commit on the Hub.
            token: token for a private repository.
            cache_dir: where downloads are kept.
            local_files_only: whether to look in the cache alone.

        Raises:
            AdapterError: if the folder is not a whole context adapter of a known format, or does not fit the base
                model. The pipeline is then as it was before.
            ValueError: if a context adapter, an IP-Adapter or a LoRA of the name "context" is loaded already.
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
        if self._context_lora_models:
            raise ValueError(
                f"A LoRA of the name '{LORA_ADAPTER}' is loaded already; call `delete_adapters('{LORA_ADAPTER}')`"
                " first."
            )
        module = _read_module(folder / MODULE_FOLDER)
        attach_context_module(self.unet, module, config["injection"])
        try:
            load_attention(self.unet, read_attention(folder))
            if config["mode"] == "lora":
                self._load_context_lora(folder)
            if config.get("scheduler"):
                self.set_context_scheduler(config["scheduler"])
            attached_adapter(self.unet).trained_full = config["mode"] == "full"
        except Exception:
            self.unload_context_adapter()
            raise
        own_base = Path(self.config.get("_name_or_path") or "").resolve()
        if config["mode"] == "full" and own_base != Path(pretrained_model_name_or_path).resolve():
            logger.warning(
                f"This context adapter was trained together with its UNet; load the pipeline from"
                f" '{pretrained_model_name_or_path}' as well."
            )

    def save_context_adapter(
        self, save_directory: str | os.PathLike, *, mode: str | None = None, card: dict[str, Any] | None = None
    ) -> Path:
        """Saves the loaded adapter, with its LoRA if it has one, and a model card.

        Beside an adapter of mode `full` the pipeline has to be saved too, by `save_pretrained`.

        Args:
            save_directory: folder to write to; made if need be.
            mode: `frozen`, `lora` or `full`, how it was trained; by default read off what is loaded.
            card: further arguments of [`~hub.render_model_card`], such as `results` and `training`.

        Raises:
            ValueError: if no adapter is loaded, or its weights have been put away on disk.
            RuntimeError: if a part of it has been removed or replaced since.
        """
        module, adapter = self._require_context_module(), attached_adapter(self.unet)
        check_no_disk_offload(self.unet)
        mode = mode or ("full" if adapter.trained_full else "lora" if self._context_lora_models else "frozen")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = adapter_config(
            module,
            self.unet,
            self.scheduler,
            # in mode full, the pipeline that is saved beside the adapter has the schedule of training itself
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
        """Saves the pipeline in its plain form, that any Stable Diffusion pipeline loads; the adapter is saved by
        `save_context_adapter`, LoRAs by `save_lora_weights`. A UNet that learned as a whole is saved with the noise
        schedule that it learned with.

        Raises:
            ValueError: if LoRAs have been fused into the weights.
        """
        if has_context_module(self.unet) and not Path(save_directory, CONFIG_NAME).exists():
            logger.warning(
                "The pipeline is saved without its context adapter; call `save_context_adapter` or"
                " `push_context_adapter` for that as well."
            )
        adapter = attached_adapter(self.unet)
        with ExitStack() as stack:
            stack.enter_context(_restored(self, self.scheduler))
            if adapter.plain_scheduler is not None and not adapter.trained_full:
                self.scheduler = adapter.plain_scheduler
            stack.enter_context(context_module_detached(self.unet))
            for model in self._lora_models.values():
                stack.enter_context(lora_detached(model))
            super().save_pretrained(str(save_directory), **kwargs)  # type: ignore[misc]

    def unload_context_adapter(self) -> None:
        """Takes the adapter off, with its LoRAs, and leaves the plain pipeline; without an adapter, does nothing.

        Where the adapter brought its own noise schedule, the pipeline's first scheduler comes back; other pipelines
        that share the UNet keep theirs.

        Raises:
            ValueError: if its LoRA has been fused into the weights.
        """
        self._check_unfused()
        plain_scheduler = attached_adapter(self.unet).plain_scheduler
        detach_context_module(self.unet)
        if plain_scheduler is not None:
            self.scheduler = plain_scheduler
        self._delete_context_lora()

    def load_ip_adapter(self, *args, **kwargs) -> None:
        """Loads an IP-Adapter, which takes the place that a context adapter needs.

        Raises:
            ValueError: if a context adapter is loaded.
        """
        if self.context_module is not None:
            raise ValueError(
                "A context adapter is loaded in the place of an IP-Adapter; call `unload_context_adapter()` first."
            )
        super().load_ip_adapter(*args, **kwargs)  # type: ignore[misc]

    def unload_ip_adapter(self) -> None:
        """Unloads an IP-Adapter, or a context adapter in its place: diffusers would leave half of that behind."""
        if has_context_module(self.unet):
            self.unload_context_adapter()
        else:
            super().unload_ip_adapter()  # type: ignore[misc]

    def set_context_scale(self, scale: float) -> None:
        """Weighs the context tokens in the cross-attention, and the adapter's LoRAs: 1 as trained, 0 the plain model.

        A UNet that learned as a whole (mode `full`) stays what it learned to be.

        Raises:
            ValueError: if no adapter is loaded, the scale is negative, its tokens are in the prompt and the scale is
                neither 0 nor 1, its LoRA has been fused, or it came with a noise schedule of its own and the scale is
                not 1.
        """
        self._require_context_module()
        self._check_unfused()
        if scale != 1 and attached_adapter(self.unet).plain_scheduler is not None:
            raise ValueError(
                "This adapter came with a noise schedule that the plain model does not know, so it cannot be weighed;"
                " call `unload_context_adapter()` for the plain model."
            )
        set_context_scale(self.unet, scale)
        for layer in self._context_lora_layers:
            layer.set_scale(LORA_ADAPTER, scale)

    def set_context_scheduler(self, options: dict[str, Any]) -> None:
        """Gives the pipeline the noise schedule that the attached adapter learns with, until it is unloaded.

        Args:
            options: what differs from the base model's schedule, of `prediction_type`, `rescale_betas_zero_snr` and
                `timestep_spacing`. A scheduler that does not know one of them gives way to DDIM, and so does PNDM,
                the default of Stable Diffusion 1.x, which knows fewer prediction types.

        Raises:
            ValueError: if no adapter is attached.
        """
        self._require_context_module()
        kind = type(self.scheduler)
        if kind is PNDMScheduler or not set(options) <= set(inspect.signature(kind.__init__).parameters):
            kind, options = DDIMScheduler, {"clip_sample": False} | options
        adapter = attached_adapter(self.unet)
        adapter.plain_scheduler = adapter.plain_scheduler or self.scheduler
        self.scheduler = kind.from_config(adapter.plain_scheduler.config, **options)
        adapter.prediction_type = self.scheduler.config.prediction_type

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
            repo_id: repository to push to; made if need be.
            token: token with write access; the one of `hf auth login` by default.
            private: whether a new repository is private.
            commit_message: message of the commit.
            create_pr: whether to open a pull request.
            card: further arguments of the model card, see `save_context_adapter`.

        Raises:
            ValueError: if no adapter is loaded.
            LocalTokenNotFoundError: if there is no token.
            PermissionError: if the Hub does not accept the token.
            ConnectionError: if the Hub cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_context_adapter(folder, card={"repo_id": repo_id} | (card or {}))
            if attached_adapter(self.unet).trained_full:
                self.save_pretrained(folder)
            return push_adapter_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _require_context_module(self) -> ContextModule:
        """The context module.

        Raises:
            ValueError: if there is none.
            RuntimeError: if a part of the adapter has been removed or replaced since it was loaded.
        """
        module = self.context_module
        if module is None:
            raise ValueError("No context adapter is loaded; call `load_context_adapter(...)` first.")
        adapter = attached_adapter(self.unet)
        if adapter.prediction_type not in (None, self.scheduler.config.prediction_type):
            raise RuntimeError(
                f"The context adapter was trained for {adapter.prediction_type}, and this pipeline's scheduler is for"
                f" {self.scheduler.config.prediction_type}. A pipeline that shares its UNet has loaded the adapter:"
                " make this one after that, with `from_pipe`, or give it that one's scheduler."
            )
        if adapter.has_lora and not self._context_lora_models:
            raise RuntimeError(
                "The context adapter's LoRA has been removed, as `unload_lora_weights()` does; call"
                " `unload_context_adapter()` and `load_context_adapter(...)` again."
            )
        return module


@contextmanager
def _restored(pipeline: ContextAdapterLoaderMixin, scheduler: Any) -> Iterator[None]:
    """Gives the pipeline that scheduler when its `with` block is left."""
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


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
