"""LoRAs that come with a context adapter, alongside the user's own."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from ..adapter_format import LORA_WEIGHTS_NAME, AdapterError
from .backbones import Backbone, backbone_of_pipeline
from .lora_layers import LORA_ADAPTER, acting_loras, active_loras, lora_layers, lora_weight, loras_of
from .text_encoders import text_encoders_of


# what errors of torch and PEFT say where a LoRA is for other layers
_MISFIT = ("size mismatch", "not found in the base model")


class ContextLoraMixin:
    """Methods of a pipeline that concern LoRAs. A context adapter and its LoRAs have one scale and act as one.

    `set_context_scale(s)` and `set_adapters(["context", ...], [s, ...])` are the same for it. LoRAs that
    `set_adapters` does not name are switched off, but the context adapter stays as it is; give it a weight of 0 to
    switch it off. `disable_lora()` switches off an adapter that has LoRAs as a whole, its tokens included, and
    `enable_lora()` switches it on again; an adapter without LoRAs is not affected.
    """

    components: dict[str, Any]
    lora_state_dict: Callable[..., Any]
    load_lora_into_text_encoder: Callable[..., None]
    save_lora_weights: Callable[..., None]

    @property
    def _backbone(self) -> Backbone:
        """The model that denoises."""
        return backbone_of_pipeline(self)

    def load_lora_weights(self, *args, **kwargs) -> None:
        """Loads a LoRA as in diffusers, which switches off the others of its models; the context adapter's own stays
        active, with its weight."""
        active = [model for model in self._context_lora_models.values() if LORA_ADAPTER in active_loras(model)]
        super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]
        for model in active:
            if LORA_ADAPTER not in active_loras(model):
                model.set_adapter([*active_loras(model), LORA_ADAPTER])

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs, as in diffusers; an adapter that came with one has to be loaded again.

        Raises:
            ValueError: if the adapter's LoRA is fused into the weights: removing it would not take it out of them.
        """
        self._check_unfused()
        super().unload_lora_weights()  # type: ignore[misc]

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict | list[float] | list[dict] | list[None] | None = None,
    ) -> None:
        """Sets the active LoRAs and their weights, as in diffusers; "context" is the whole context adapter.

        Args:
            adapter_names: names of LoRAs; those not named are switched off, except the context adapter.
            adapter_weights: one weight for all, or one each; 1 by default. That of "context" is a number, see
                `set_context_scale`.

        Raises:
            ValueError: if a name is unknown, the numbers of names and weights differ, or the context adapter cannot
                have the weight.
        """
        if not self._backbone.has_context_module:
            super().set_adapters(adapter_names, adapter_weights)  # type: ignore[misc]
            return
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(names) != len(weights):
            raise ValueError(f"There are {len(names)} names of adapters and {len(weights)} weights; give one each.")
        weight_of: dict[str, Any] = dict(zip(names, weights))
        scale = weight_of.setdefault(LORA_ADAPTER, self._backbone.adapter.scale)
        scale = 1.0 if scale is None else scale
        self._check_context_scale(scale)
        if not self._context_lora_models:
            del weight_of[LORA_ADAPTER]
        if weight_of:
            super().set_adapters(list(weight_of), list(weight_of.values()))  # type: ignore[misc]
        else:  # which diffusers cannot do
            for layer in self._all_lora_layers:
                layer.set_adapter([])
        self._backbone.adapter.scale = float(scale)
        self._apply_context_scale()

    def disable_lora(self) -> None:
        """Disables all LoRAs, and with its LoRAs the context adapter as a whole, until `enable_lora()`.

        Raises:
            ValueError: if the context adapter has a noise schedule of its own, without which the plain model is lost.
        """
        if self._backbone.has_context_module and self._context_lora_models:
            self._check_context_scale(0)
        super().disable_lora()  # type: ignore[misc]
        self._apply_context_scale()

    def enable_lora(self) -> None:
        """Enables all active LoRAs, and with its LoRAs the context adapter, with the scale that it had."""
        super().enable_lora()  # type: ignore[misc]
        self._apply_context_scale()

    def _check_context_scale(self, scale: Any) -> None:
        """Checks that the adapter can have this scale."""
        if not isinstance(scale, Real):
            raise ValueError(f"The scale of a context adapter is one number, and not {scale!r}.")
        adapter = self._backbone.adapter
        if scale != 1 and adapter.plain_scheduler is not None:
            raise ValueError(
                "This adapter came with a noise schedule that the plain model does not know, so its scale is always 1;"
                " call `unload_context_adapter()` for the plain model."
            )
        if scale != adapter.scale:
            self._check_unfused()
        self._backbone.check_token_scale(float(scale))

    def _apply_context_scale(self) -> None:
        """Gives tokens and LoRAs the adapter's scale; where its LoRAs are disabled, its tokens are too."""
        if not self._backbone.has_context_module:
            return
        self._backbone.set_token_scale(self._expected_scale * self._backbone.adapter.call_scale)
        for layer in self._context_lora_layers:
            if LORA_ADAPTER not in layer.merged_adapters:  # whose scale says what `unfuse_lora` has to take out
                layer.set_scale(LORA_ADAPTER, self._backbone.adapter.scale)

    @property
    def _expected_scale(self) -> float:
        """The scale that tokens and LoRAs of the adapter have between calls."""
        is_disabled = any(layer.disable_adapters for layer in self._context_lora_layers)
        return 0.0 if is_disabled else self._backbone.adapter.scale

    @contextmanager
    def _scaled_for_call(self, lora_scale: float = 1.0) -> Iterator[None]:
        """While it is open, an adapter with LoRAs has its tokens weighed as a call weighs LoRAs.

        The scale that callbacks set meanwhile ends with it.

        Raises:
            ValueError: if the adapter cannot have that scale.
        """
        adapter = self._backbone.adapter
        scale = adapter.scale
        if self._context_lora_models and lora_scale != 1:
            self._check_context_scale(scale * lora_scale)
            adapter.call_scale = float(lora_scale)
            self._apply_context_scale()
        try:
            yield
        finally:
            if (adapter.scale, adapter.call_scale) != (scale, 1.0):
                adapter.scale, adapter.call_scale = scale, 1.0
                self._apply_context_scale()  # also the LoRA: weighed by 0, diffusers gives it back a scale of 1

    def _check_unfused(self) -> None:
        if any(LORA_ADAPTER in layer.merged_adapters for layer in self._context_lora_layers):
            raise ValueError("The context adapter's LoRA has been fused into the weights; call `unfuse_lora()` first.")

    def _warn_of_halves(self) -> None:
        """Warns if the adapter's tokens and LoRAs do not act as one, as methods of the models themselves can do."""
        layers = [layer for layer in self._context_lora_layers if LORA_ADAPTER in layer.scaling]
        tokens, expected = self._backbone.token_scales, self._expected_scale
        if tokens != {0.0} and not all(LORA_ADAPTER in acting_loras(layer) for layer in layers):
            message = (
                "The context adapter's own LoRA is not active, so interventions do not do what was learned; call"
                f' `pipe.set_adapters(["{LORA_ADAPTER}", ...])` with the names of all LoRAs that are to act.'
            )
        elif tokens != {expected}:
            message = (
                f"The scale of the context adapter's tokens was set to {sorted(tokens)} and not by this pipeline;"
            )
            message += f" call `pipe.set_context_scale({expected:g})`."
        elif any(not math.isclose(lora_weight(layer), expected, abs_tol=1e-6) for layer in layers) and expected:
            message = (
                f"The weight of the context adapter's LoRA is not {expected:g}, that of its tokens; call"
                f" `pipe.set_context_scale({expected:g})`, between `unfuse_lora()` and `fuse_lora()` if it is fused."
            )
        else:
            return
        warnings.warn(message, stacklevel=2)  # where it comes from makes no difference: it is shown once

    def _load_context_lora(self, folder: Path) -> None:
        active = {name: active_loras(model) for name, model in self._lora_models.items()}
        file = folder / LORA_WEIGHTS_NAME
        try:
            self._read_context_lora(folder)
        except Exception as error:  # diffusers and PEFT raise many types, and name no file
            misfits = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in _MISFIT)]
            if misfits:
                raise AdapterError(
                    f"{file} does not fit the base model ({misfits[0]}); load the one that the adapter was trained on."
                ) from error
            raise AdapterError(f"{file} cannot be loaded ({type(error).__name__}: {error}).") from error
        for name, model in self._context_lora_models.items():
            model.set_adapter([*active[name], LORA_ADAPTER])  # loading leaves the new one alone active
        self._backbone.adapter.lora_models = frozenset(self._context_lora_models)

    def _read_context_lora(self, folder: Path) -> None:
        """Does what `load_lora_weights` does, without its warning for every model that the file has nothing for."""
        state, *alphas, metadata = self.lora_state_dict(
            str(folder), weight_name=LORA_WEIGHTS_NAME, return_lora_metadata=True
        )
        trained = {key.partition(".")[0] for key in state}
        if not trained <= set(self._lora_models):
            raise ValueError(f"layers of {sorted(trained)} not found in the base model's {sorted(self._lora_models)}")
        options: dict[str, Any] = {"metadata": metadata, "adapter_name": LORA_ADAPTER}
        options |= {"_pipeline": self, "low_cpu_mem_usage": True}
        component, network_alphas = self._backbone.component, (alphas or [None])[0]
        if component in trained:
            load = getattr(self, f"load_lora_into_{component}")
            takes_alphas = "network_alphas" in inspect.signature(load).parameters  # Stable Diffusion 3's does not
            own = {component: self._backbone.model} | ({"network_alphas": network_alphas} if takes_alphas else {})
            load(state, **own, **options)
        for name, model in text_encoders_of(self.components).items():
            if name in trained:
                self.load_lora_into_text_encoder(
                    state, network_alphas=network_alphas, text_encoder=model, prefix=name, **options
                )

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
            if not loras_of(model):
                recurse_remove_peft_layers(model)  # deleting the last one has left its empty layers behind

    @property
    def _lora_models(self) -> dict[str, Any]:
        """The models that can have a LoRA, by component name."""
        return {self._backbone.component: self._backbone.model} | text_encoders_of(self.components)

    @property
    def _context_lora_models(self) -> dict[str, Any]:
        """The models that have the adapter's own LoRA."""
        return {name: model for name, model in self._lora_models.items() if LORA_ADAPTER in loras_of(model)}

    @property
    def _context_lora_layers(self) -> list[BaseTunerLayer]:
        """All LoRA layers of those models."""
        return [layer for model in self._context_lora_models.values() for layer in lora_layers(model)]

    @property
    def _all_lora_layers(self) -> list[BaseTunerLayer]:
        return [layer for model in self._lora_models.values() for layer in lora_layers(model)]
