"""Fine-tune pretrained diffusion models to learn causally disentangled concepts that compose."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import quiet as quiet  # before diffusers
from .embedded import embedded_adapter, embedded_base
from .version import __version__


if TYPE_CHECKING:
    from .context import ContextModule
    from .pipelines import (
        ComposableControlNetImg2ImgPipeline,
        ComposableControlNetInpaintPipeline,
        ComposableControlNetPipeline,
        ComposableFluxPipeline,
        ComposableImg2ImgPipeline,
        ComposableInpaintPipeline,
        ComposablePipeline,
        ComposableSD3Pipeline,
        ComposableXLControlNetImg2ImgPipeline,
        ComposableXLControlNetInpaintPipeline,
        ComposableXLControlNetPipeline,
        ComposableXLImg2ImgPipeline,
        ComposableXLInpaintPipeline,
        ComposableXLPipeline,
    )

__all__ = [
    "ComposableControlNetImg2ImgPipeline",
    "ComposableControlNetInpaintPipeline",
    "ComposableControlNetPipeline",
    "ComposableFluxPipeline",
    "ComposableImg2ImgPipeline",
    "ComposableInpaintPipeline",
    "ComposablePipeline",
    "ComposableSD3Pipeline",
    "ComposableXLControlNetImg2ImgPipeline",
    "ComposableXLControlNetInpaintPipeline",
    "ComposableXLControlNetPipeline",
    "ComposableXLImg2ImgPipeline",
    "ComposableXLInpaintPipeline",
    "ComposableXLPipeline",
    "ContextModule",
    "__version__",
    "embedded_adapter",
    "embedded_base",
]

# imported when they are asked for: PyTorch and diffusers take seconds, which `diffusers_ctx.hub` does not need
_LAZY = {name: ".pipelines" for name in __all__ if name.endswith("Pipeline")} | {"ContextModule": ".context"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
