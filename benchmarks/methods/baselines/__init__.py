"""Baselines: LoRAs, and the ways of composing them."""

from .composable_diffusion import ComposableDiffusion
from .concept_sliders import ConceptSliders
from .lora_per_context import LoraDifference, LoraPerContext
from .prompt_lora import PromptLora


__all__ = ["ComposableDiffusion", "ConceptSliders", "LoraDifference", "LoraPerContext", "PromptLora"]
