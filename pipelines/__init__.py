from .composition import CompositionMixin
from .conditioning import Conditioner, select_rows
from .flux import ComposableFluxPipeline
from .outputs import ComposablePipelineOutput
from .stable_diffusion import (
    ComposableControlNetImg2ImgPipeline,
    ComposableControlNetInpaintPipeline,
    ComposableControlNetPipeline,
    ComposableImg2ImgPipeline,
    ComposableInpaintPipeline,
    ComposablePipeline,
)
from .stable_diffusion_3 import ComposableSD3Pipeline
from .stable_diffusion_xl import (
    ComposableXLControlNetImg2ImgPipeline,
    ComposableXLControlNetInpaintPipeline,
    ComposableXLControlNetPipeline,
    ComposableXLImg2ImgPipeline,
    ComposableXLInpaintPipeline,
    ComposableXLPipeline,
)
from .truncation import describe_truncated, truncation_unsaid


__all__ = [
    "ComposableControlNetImg2ImgPipeline",
    "ComposableControlNetInpaintPipeline",
    "ComposableControlNetPipeline",
    "ComposableFluxPipeline",
    "ComposableImg2ImgPipeline",
    "ComposableInpaintPipeline",
    "ComposablePipeline",
    "ComposablePipelineOutput",
    "ComposableSD3Pipeline",
    "ComposableXLControlNetImg2ImgPipeline",
    "ComposableXLControlNetInpaintPipeline",
    "ComposableXLControlNetPipeline",
    "ComposableXLImg2ImgPipeline",
    "ComposableXLInpaintPipeline",
    "ComposableXLPipeline",
    "CompositionMixin",
    "Conditioner",
    "describe_truncated",
    "select_rows",
    "truncation_unsaid",
]
