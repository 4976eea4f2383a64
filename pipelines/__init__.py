from .composable import ComposablePipeline
from .composable_xl import ComposableXLPipeline
from .composition import ComposablePipelineOutput, CompositionMixin


__all__ = ["ComposablePipeline", "ComposablePipelineOutput", "ComposableXLPipeline", "CompositionMixin"]
