from .composition import CompositionMixin
from .conditioning import Conditioner
from .outputs import ComposablePipelineOutput
from .stable_diffusion import ComposablePipeline
from .stable_diffusion_xl import ComposableXLPipeline
from .truncation import describe_truncated, truncation_unsaid


__all__ = [
    "ComposablePipeline",
    "ComposablePipelineOutput",
    "ComposableXLPipeline",
    "CompositionMixin",
    "Conditioner",
    "describe_truncated",
    "truncation_unsaid",
]
