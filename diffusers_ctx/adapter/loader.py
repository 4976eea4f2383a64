"""Loading context adapters into pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..adapter_format import MODULE_FOLDER, AdapterError, validate_adapter_folder
from ..context import ContextModule, Interventions, Summand, intervention_mask, summands_of
from ..hub import resolve_adapter_folder
from ..paths import local_or_hub, local_path
from .lora import ContextLoraMixin
from .lora_layers import LORA_ADAPTER
from .offloading import check_no_disk_offload, on_device
from .scheduler import check_scheduler, set_context_scheduler
from .weights import check_base, load_attention, read_attention


logger = logging.get_logger(__name__)

SAVED_ADAPTER = "_context_adapter"  # names, in a pipeline's config, the folder of the adapter that is saved with it
_DOWNLOAD_OPTIONS = ("cache_dir", "revision", "token", "local_files_only")


class ContextAdapterLoaderMixin(ContextLoraMixin):
    """Loads a context adapter into a pipeline, sets its scale and unloads it."""

    scheduler: Any
    config: Any
    _execution_device: torch.device

    @property
    def context_module(self) -> ContextModule | None:
        """The context module that is loaded, or `None`."""
        return self._backbone.context_module

    @property
    def concepts(self) -> list[str]:
        """Names of the concepts that can be intervened on; empty without an adapter."""
        module = self.context_module
        return list(module.config.concepts) if module is not None else []

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, context_adapter: bool = True, **kwargs: Any
    ) -> Any:
        """Loads a pipeline, as in diffusers, and the context adapter that was saved with it, if there is one.

        `context_adapter=False` leaves that out.

        Raises:
            OSError: if there is no such folder or repository; for a mistyped folder, without asking the network.
            AdapterError: if an adapter was saved with it and cannot be loaded.
        """
        if kwargs.get("cache_dir"):
            kwargs["cache_dir"] = local_path(kwargs["cache_dir"])
        name = local_or_hub(pretrained_model_name_or_path)
        pipeline = super().from_pretrained(name, **kwargs)  # type: ignore[misc]
        if not context_adapter:
            return pipeline
        options = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}
        try:
            saved = cls.load_config(name, **options)  # type: ignore[attr-defined]
        except OSError:  # a pipeline in a single file has none
            return pipeline
        if subfolder := saved.get(SAVED_ADAPTER):
            pipeline.load_context_adapter(name, subfolder=subfolder, **options)
        return pipeline

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
        config, backbone = validate_adapter_folder(folder), self._backbone
        backbone.check_unoccupied()
        check_base(config, backbone, self.scheduler)
        if config["mode"] == "lora":
            backbone.check_projections()
        if self._context_lora_models:
            raise ValueError(
                f"A LoRA named '{LORA_ADAPTER}' is loaded already; call `delete_adapters('{LORA_ADAPTER}')` first."
            )
        module = _read_module(folder / MODULE_FOLDER)
        backbone.attach(module, config["injection"])
        try:
            load_attention(backbone, read_attention(folder))
            if config["mode"] == "lora":
                self._load_context_lora(folder)
            if config.get("scheduler"):
                set_context_scheduler(self, config["scheduler"])
            backbone.adapter.trained_full = config["mode"] == "full"
        except Exception:
            self.unload_context_adapter()
            raise
        own_base = Path(self.config.get("_name_or_path") or "").resolve()
        if config["mode"] == "full" and own_base != local_path(pretrained_model_name_or_path).resolve():
            logger.warning(
                f"This context adapter was trained together with its {backbone.name}; load the pipeline from"
                f" '{pretrained_model_name_or_path}' as well."
            )

    def unload_context_adapter(self) -> None:
        """Removes the adapter and its LoRAs, which leaves the plain pipeline; without an adapter, does nothing.

        If the adapter has its own noise schedule, the pipeline's first scheduler comes back; other pipelines that
        share the backbone keep theirs.

        Raises:
            ValueError: if its LoRA is fused into the weights.
        """
        self._check_unfused()
        scheduler = self._backbone.adapter.plain_scheduler
        self._backbone.detach()
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
        """Sets the scale of an IP-Adapter as in diffusers, or of the context adapter and its LoRAs if one is loaded.

        `IPAdapterScaleCutoffCallback` calls it.

        Raises:
            ValueError: if the context adapter cannot have the scale, see `set_context_scale`.
        """
        if self._backbone.has_context_module:
            self.set_context_scale(scale)  # type: ignore[arg-type]
        else:
            super().set_ip_adapter_scale(scale)  # type: ignore[misc]

    def set_context_scale(self, scale: float) -> None:
        """Sets the adapter's scale, of its context tokens and its LoRAs alike: 1 as trained, 0 the plain model.

        A callback that sets it does so for the rest of its call, which ends with the scale that it began with.
        `set_adapters(["context", ...], [scale, ...])` sets the same scale. A backbone that was trained as a whole
        (mode `full`) stays as trained.

        Raises:
            ValueError: if no adapter is loaded, the scale is no number or negative, its tokens are in the prompt and
                the scale is neither 0 nor 1, its LoRA is fused, or it has a noise schedule of its own and the scale
                is not 1.
        """
        self._require_context_module()
        self._check_context_scale(scale)
        self._backbone.adapter.scale = float(scale)
        self._apply_context_scale()

    def _check_no_context_adapter(self) -> None:
        if self._backbone.has_context_module:
            raise ValueError(
                "A context adapter is loaded, and an IP-Adapter would take the same place in the"
                f" {self._backbone.name}; call `unload_context_adapter()` first."
            )

    def _mask(self, interventions: Interventions | Sequence[Interventions], num_rows: int) -> torch.Tensor:
        """The mask (num_rows, K) of interventions on this adapter's concepts."""
        config = self._require_context_module().config
        return intervention_mask(interventions, config.concepts, num_rows, config.obs_context)

    def _summands(
        self, noise: torch.Tensor, mask: torch.Tensor, add_scores: bool | None = None, scale: float = 1.0
    ) -> list[Summand]:
        """The predictions that one under a mask (B, K) and exogenous noise (B, N, d_z) is the sum of.

        Args:
            noise: the noise.
            mask: strengths of interventions.
            add_scores: whether several interventions are a sum, see [`~context.summands_of`]; by default if the
                adapter has no noise.
            scale: of the contrast to the observational context, `e_obs + scale (e - e_obs)`.
        """
        with self._context_module_on_device() as (module, device):
            noise, mask = noise.to(device), mask.to(device)
            adds = not module.has_noise.any() if add_scores is None else add_scores
            if adds and ((mask > 0).sum(dim=1) > 1).any():
                summands = summands_of(module, noise, mask)
            else:
                summands = [Summand(torch.ones_like(noise[:, 0, 0]), module(noise, mask))]
            if scale == 1:
                return summands
            observational = module(noise, torch.zeros_like(mask))
        contrast = [Summand(scale * weights, tokens) for weights, tokens in summands]
        return [*contrast, Summand(torch.full_like(summands[0].weights, 1 - scale), observational)]

    @contextmanager
    def _context_module_on_device(self) -> Iterator[tuple[ContextModule, torch.device]]:
        """The context module, with its weights on the pipeline's device, and that device."""
        module, device = self._require_context_module(), self._execution_device
        check_no_disk_offload(self._backbone.model)
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
            self._backbone.check_projections()
        if self._backbone.adapter.lora_models & set(self._lora_models) - set(self._context_lora_models):
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
