"""Images in contexts: folders, datasets, the order they are seen in, and the generated benchmark quad."""

from . import quad
from .context_dataset import concepts_of, context_mask, interventions_of, load_context_dataset
from .sampler import ContextBalancedSampler


__all__ = [
    "ContextBalancedSampler",
    "concepts_of",
    "context_mask",
    "interventions_of",
    "load_context_dataset",
    "quad",
]
