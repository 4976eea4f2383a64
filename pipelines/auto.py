"""What diffusers' `AutoPipelineFor...` classes know of composing pipelines."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)


_TASKS = (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING)


def tell_auto_pipelines(cls: type[DiffusionPipeline], plain_class: type[DiffusionPipeline]) -> None:
    """Lets `AutoPipelineFor....from_pipe` make a composing pipeline from a composing one.

    The first class made of each plain class stands for it. From a pipeline of a later one, other tasks get the
    former: of an own subclass of `ComposablePipeline`, image to image is `ComposableImg2ImgPipeline`.
    """
    for task in _TASKS:
        for model in [model for model, kind in task.items() if kind is plain_class]:
            family = f"composable-{model}"
            if family not in task:
                task[family] = cls
                continue
            for other in _TASKS:
                if family in other:
                    other[cls.__name__] = cls if other is task else other[family]
