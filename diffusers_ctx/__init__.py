"""Fine-tune pretrained diffusion models to learn causally disentangled concepts that compose."""

from . import quiet  # noqa: F401  (first, before diffusers is imported)
from .context import ContextModule
from .embedded import embedded_adapter, embedded_base
from .pipelines import ComposablePipeline, ComposableXLPipeline
from .version import __version__


__all__ = [
    "ComposablePipeline",
    "ComposableXLPipeline",
    "ContextModule",
    "__version__",
    "embedded_adapter",
    "embedded_base",
]
