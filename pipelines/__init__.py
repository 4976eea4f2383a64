from .composable import ComposablePipeline, ComposablePipelineOutput


__all__ = ["ComposablePipeline", "ComposablePipelineOutput"]
