"""Every method of the benchmark, by name."""

from __future__ import annotations

from typing import Any

from diffusers_ctx.training.config import ContextConfig

from .ablations import TRUE_GRAPH, Oracle, Pooled, UnconditionalPosterior, oracle_graph
from .baselines import ComposableDiffusion, ConceptSliders, LoraDifference, LoraPerContext, MeanDifference, PromptLora
from .context_adapter import ContextAdapter
from .given_noise import LabelsOnly
from .light_vae import LightVae
from .reconstruction import Reconstruction
from .setting import Method


_VAE_SECONDS = 11.4 * 60  # as long as a context adapter took on one core


def create_methods(dependent: bool) -> dict[str, Method]:
    """Every method by name, for a variant of quad."""
    forms: dict[str, dict[str, Any]] = {
        "": {},
        "-graph": {"graph": list(TRUE_GRAPH) if dependent else []},
        "-reduced": {"causal_form": "reduced_form"},
    }
    adapters = {
        f"{'ours' if mode == 'lora' else mode}{suffix}": ContextAdapter(mode, ContextConfig(**form))
        for mode in ("lora", "frozen", "full")
        for suffix, form in forms.items()
    }
    given = ContextConfig(num_hidden_factors=2, graph=list(oracle_graph(dependent)), posterior_encoder="vae")
    of_latents = ContextConfig(posterior_encoder="vae")
    amortized = ContextConfig(posterior_type="amortized", posterior_encoder="vae")
    return {
        **adapters,
        "ours-latents": ContextAdapter(context=of_latents),
        "oracle": Oracle(context=given),
        "base": PromptLora(contexts=("obs",), named=False),
        "base-pooled": PromptLora(named=False),
        "module-pooled": Pooled(context=of_latents),
        "amortized": ContextAdapter(context=amortized),
        "posterior-untold": UnconditionalPosterior(context=amortized),
        "labels-only": LabelsOnly(context=of_latents),
        "prompt-lora": PromptLora(),
        "lora-per-context": LoraPerContext(),
        "composable-diffusion": ComposableDiffusion("prompt-lora", PromptLora()),
        "concept-sliders": ConceptSliders("prompt-lora"),
        "paper-vae": LightVae(_VAE_SECONDS),
        "autoencoder": Reconstruction(),
    }


def create_bed_methods() -> dict[str, Method]:
    """Every method by name, for any test bed; those that compose another's weights come after it."""
    labels, loras, names = LabelsOnly(context=ContextConfig(posterior_encoder="vae")), LoraPerContext(), PromptLora()
    return {
        "ours": ContextAdapter(match_prompt=None),
        "mean-difference": MeanDifference(),
        "base-pooled": PromptLora(named=False),
        "labels-only": labels,
        "labels-scores": ComposableDiffusion("labels-only", labels),
        "lora-per-context": loras,
        "lora-difference": LoraDifference("lora-per-context"),
        "lora-scores": ComposableDiffusion("lora-per-context", loras),
        "prompt-lora": names,
        "composable-diffusion": ComposableDiffusion("prompt-lora", names),
        "concept-sliders": ConceptSliders("prompt-lora"),
    }
