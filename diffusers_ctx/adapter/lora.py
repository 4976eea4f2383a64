"""The LoRAs that come with a context adapter, beside those of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.utils import delete_adapter_layers, logging, recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..adapter_format import LORA_WEIGHTS_NAME, AdapterError
from .attention import attached_adapter


logger = logging.get_logger(__name__)

LORA_ADAPTER = "context"  # the name that PEFT knows the adapter's own LoRA by


class ContextLoraMixin:
    """Gives a pipeline of diffusers with a `unet` what a context adapter does with LoRAs."""

    unet: UNet2DConditionModel
    components: dict[str, Any]
    lora_state_dict: Callable[..., Any]
    load_lora_into_unet: Callable[..., None]
    load_lora_into_text_encoder: Callable[..., None]
    save_lora_weights: Callable[..., None]

    @property
    def text_encoders(self) -> dict[str, PreTrainedModel]:
        """The text encoders that there are, by their names."""
        return {
            name: model
            for name, model in self.components.items()
            if name.startswith("text_encoder") and model is not None
        }

    def load_lora_weights(self, *args, **kwargs) -> None:
        """Loads a LoRA as diffusers does, which leaves it alone active in the models that it is for. The context
        adapter's own stays active beside it, with its weight."""
        active = [model for model in self._context_lora_models.values() if LORA_ADAPTER in _active_loras(model)]
        super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]
        for model in active:
            if LORA_ADAPTER not in _active_loras(model):
                model.set_adapter([*_active_loras(model), LORA_ADAPTER])

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs, as diffusers does; an adapter that came with one has to be loaded again.

        Raises:
            ValueError: if the adapter's has been fused into the weights, which would stay as they are.
        """
        self._check_unfused()
        super().unload_lora_weights()  # type: ignore[misc]

    def _check_unfused(self) -> None:
        if any(LORA_ADAPTER in layer.merged_adapters for layer in self._context_lora_layers):
            raise ValueError("The context adapter's LoRA has been fused into the weights; call `unfuse_lora()` first.")

    def _warn_of_inactive_lora(self) -> None:
        """Says once that the adapter's own LoRA is switched off, as `set_adapters` and `disable_lora` do it."""
        adapter = attached_adapter(self.unet)
        if adapter.warned_of_lora:
            return
        layers = [layer for layer in self._context_lora_layers if LORA_ADAPTER in layer.scaling]
        if all(LORA_ADAPTER in _acting_loras(layer) for layer in layers):
            return
        logger.warning(
            "The context adapter's own LoRA is not active, and interventions do not do what was learned; call"
            f' `pipe.set_adapters(["{LORA_ADAPTER}", ...])` with the names of all LoRAs that are to act, and after'
            " `disable_lora()` first `enable_lora()`."
        )
        adapter.warned_of_lora = True

    def _load_context_lora(self, folder: Path) -> None:
        active = {name: _active_loras(model) for name, model in self._lora_models.items()}
        try:
            self._read_context_lora(folder)
        except Exception as error:  # diffusers and PEFT raise many types, and name no file
            raise AdapterError(
                f"{folder / LORA_WEIGHTS_NAME} does not fit the base model ({error}); save or download the adapter"
                " again."
            ) from error
        for name, model in self._context_lora_models.items():
            model.set_adapter([*active[name], LORA_ADAPTER])  # loading leaves the new one alone active
        attached_adapter(self.unet).has_lora = True

    def _read_context_lora(self, folder: Path) -> None:
        """What `load_lora_weights` does, which warns of every model that the file has nothing for."""
        state, alphas, metadata = self.lora_state_dict(
            str(folder), weight_name=LORA_WEIGHTS_NAME, return_lora_metadata=True
        )
        trained = {key.partition(".")[0] for key in state}
        if not trained <= set(self._lora_models):
            raise ValueError(f"it is for {sorted(trained)}, and the models are {sorted(self._lora_models)}")
        options: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "adapter_name": LORA_ADAPTER}
        options |= {"_pipeline": self, "low_cpu_mem_usage": True}
        if "unet" in trained:
            self.load_lora_into_unet(state, unet=self.unet, **options)
        for name, model in self.text_encoders.items():
            if name in trained:
                self.load_lora_into_text_encoder(state, text_encoder=model, prefix=name, **options)

    def _save_context_lora(self, folder: Path) -> None:
        arguments: dict[str, Any] = {}
        for name, model in self._context_lora_models.items():
            state = get_peft_model_state_dict(model, adapter_name=LORA_ADAPTER, unwrap_compiled=True)
            metadata = model.peft_config[LORA_ADAPTER].to_dict()  # its α, for one
            arguments[f"{name}_lora_layers"] = state
            # without the base model's folder, which is nobody else's
            arguments[f"{name}_lora_adapter_metadata"] = metadata | {"base_model_name_or_path": None}
        self.save_lora_weights(str(folder), **arguments)

    def _delete_context_lora(self) -> None:
        for model in self._context_lora_models.values():
            delete_adapter_layers(model, LORA_ADAPTER)
            if not _loras_of(model):
                recurse_remove_peft_layers(model)  # deleting the last one has left its empty layers behind

    @property
    def _lora_models(self) -> dict[str, Any]:
        """The models that can have a LoRA, by their names."""
        return {"unet": self.unet} | self.text_encoders

    @property
    def _context_lora_models(self) -> dict[str, Any]:
        """Those that have the adapter's own."""
        return {name: model for name, model in self._lora_models.items() if LORA_ADAPTER in _loras_of(model)}

    @property
    def _context_lora_layers(self) -> list[BaseTunerLayer]:
        """Every layer of theirs that a LoRA has a part in."""
        return [layer for model in self._context_lora_models.values() for layer in _lora_layers(model)]


def _loras_of(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "peft_config", {})


def _active_loras(model: nn.Module) -> list[str]:
    layers = _lora_layers(model)
    return list(layers[0].active_adapters) if layers else []


def _acting_loras(layer: BaseTunerLayer) -> list[str]:
    return layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)


def _lora_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
