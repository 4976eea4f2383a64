from .composition import CompositionMixin
from .conditioning import Conditioner
from .outputs import ComposablePipelineOutput
from .stable_diffusion import ComposablePipeline
from .stable_diffusion_xl import ComposableXLPipeline


__all__ = [
    "ComposablePipeline",
    "ComposablePipelineOutput",
    "ComposableXLPipeline",
    "CompositionMixin",
    "Conditioner",
]
