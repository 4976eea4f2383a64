"""What the composing pipelines of all backbones share: sampling under interventions."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ctx.context import any_interventions, embed_captions

from .auto import tell_auto_pipelines
from .callbacks import callback_inputs, keeping_images
from .conditioning import Conditioner
from .guidance import adding_predictions
from .noise import fork_generator_randn
from .outputs import ComposablePipelineOutput
from .references import ReferencedInterventions, split_references
from .sweep import SweepMixin


_DEPRECATED = ("callback", "callback_steps")  # all that diffusers' pipelines still read from their `**kwargs`


class CompositionMixin(SweepMixin):
    """Gives a pipeline of diffusers interventions on the concepts of a context adapter.

    The pipeline takes image prompts, as all those of Stable Diffusion do: the plain `__call__` denoises, and context
    tokens come in as an image prompt. The mixin stands before the pipeline class in a list of bases: `class
    Mine(CompositionMixin, StableDiffusionPipeline)`.
    """

    _plain_class: type[DiffusionPipeline]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_plain_class"):
            bases = (base for base in cls.__mro__ if issubclass(base, DiffusionPipeline))
            cls._plain_class = next(base for base in bases if base is not cls)
        if cls.__call__ is CompositionMixin.__call__:
            cls.__call__ = _with_signature_of(cls._plain_class.__call__)  # type: ignore[method-assign]
        tell_auto_pipelines(cls, cls._plain_class)

    @torch.no_grad()
    def __call__(
        self,
        *args,
        interventions: ReferencedInterventions | Sequence[ReferencedInterventions] = None,
        exogenous_noise: torch.Tensor | None = None,
        context_guidance_scale: float = 1.0,
        match_prompt: bool | None = None,
        add_scores: bool | None = None,
        **kwargs,
    ) -> ComposablePipelineOutput | tuple:
        r"""Generates images under interventions.

        Takes every argument of the plain pipeline's `__call__`, and those below. Where the plain pipeline would by
        default make images of its backbone's size, `height` and `width` are those that the adapter was trained at, or
        those of `latents`.

        Args:
            interventions: concepts to intervene on: a list of names, a mapping from names to strengths in [0, 1], or
                one of these per prompt. A reference image instead of a strength gives its concept the value that
                it shows. `None` is the observational context, which is not the plain pipeline: `set_context_scale(0)`
                is.
            exogenous_noise (`torch.Tensor` of shape (number of images, N, d_z), *optional*): the concepts' noise. By
                default it is drawn with `generator`, which is not advanced, or with torch's global one on the CPU.
            context_guidance_scale (`float`): amplifies (above 1) or weakens (below 1) the contrast between the
                interventions and the observational context; 1 costs nothing.
            match_prompt (`bool`, *optional*): whether to draw exogenous noise that fits the prompt: noise whose image
                without interventions the prompt would describe. `None`, the default, does so if the adapter has
                learned from captions and no `exogenous_noise` is given. `False` draws noise regardless of the prompt;
                where the two contradict each other, either may win.
            add_scores (`bool`, *optional*): whether to compose by adding up what each intervention changes in the
                prediction, which takes a pass of the model for each, or by one pass with all of them. It makes a
                difference where an image has two or more. `None`, the default, does so if the adapter has no
                exogenous noise, as one that was trained on few images.

        Returns:
            [`ComposablePipelineOutput`], or if `return_dict` is `False` the tuple `(images, exogenous_noise)`, in
            which the noise is `None` without a context adapter.

        Raises:
            TypeError: if an argument is unknown, where a plain pipeline with `**kwargs` would ignore it.
            ValueError: if a concept is unknown, a shape does not fit, interventions are given without an adapter, or
                `match_prompt` is `True` and `exogenous_noise` is given or the adapter did not learn from captions.
        """
        plain_call = super().__call__  # type: ignore[misc]
        signature = inspect.signature(plain_call)
        _refuse_unknown(kwargs, signature)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        arguments |= arguments.pop("kwargs", {})
        return_dict, arguments["return_dict"] = arguments["return_dict"], True
        if self.context_module is None:
            is_asked = exogenous_noise is not None or match_prompt or add_scores or context_guidance_scale != 1
            if is_asked or any_interventions(interventions):
                self._require_context_module()
            return _with_noise(plain_call(**arguments), None, return_dict)
        if any(value is not None for name, value in arguments.items() if "ip_adapter_image" in name):
            raise ValueError(
                "A context adapter is loaded, and images for an IP-Adapter would take the same place in the"
                f" {self._backbone.name}; call `unload_context_adapter()` to use them."
            )
        arguments |= self._default_size(arguments)
        prompt, prompt_embeds = arguments["prompt"], arguments["prompt_embeds"]
        images_per_prompt = arguments["num_images_per_prompt"]
        num_prompts = _number_of_prompts(prompt, prompt_embeds)
        interventions, references = split_references(interventions, num_prompts)
        mask = self._mask(interventions, num_prompts)
        mask = mask.repeat_interleave(images_per_prompt, dim=0)
        captions = None
        if self._matches_prompt(match_prompt, exogenous_noise):
            captions = self._captions_of(prompt, prompt_embeds).repeat_interleave(images_per_prompt, dim=0)
        noise = self._prepare_exogenous_noise(len(mask), arguments["generator"], exogenous_noise, captions)
        noise = self._transplant(noise, [given for given in references for _ in range(images_per_prompt)])
        first, *others = self._summands(noise, mask, add_scores, context_guidance_scale)
        if arguments["callback_on_step_end"] is not None:
            names = callback_inputs(arguments["callback_on_step_end"], arguments["callback_on_step_end_tensor_inputs"])
            arguments["callback_on_step_end_tensor_inputs"] = names
            arguments["callback_on_step_end"] = keeping_images(arguments["callback_on_step_end"], len(mask))
        attention_kwargs = dict(arguments[self._backbone.attention_kwargs] or {})  # a pipeline may add to them
        arguments[self._backbone.attention_kwargs] = attention_kwargs or None
        with ExitStack() as stack:
            stack.enter_context(self._scaled_for_call(attention_kwargs.get("scale", 1.0)))
            if others:
                stack.enter_context(adding_predictions(self._backbone.model, first, others))
            output = plain_call(**self._backbone.call_with_tokens(arguments, first.tokens))
        return _with_noise(output, noise, return_dict)

    def prepare_ip_adapter_image_embeds(self, ip_adapter_image, ip_adapter_image_embeds, *args, **kwargs):
        if self.context_module is None:
            return super().prepare_ip_adapter_image_embeds(ip_adapter_image, ip_adapter_image_embeds, *args, **kwargs)
        # context tokens have a row per image already: unlike image prompts, each image has noise of its own;
        # the backbone repeats them for guidance, which a callback can end or begin
        return list(ip_adapter_image_embeds)

    def _prepare_exogenous_noise(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        exogenous_noise: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The concepts' noise (num_images, N, d_z): checked if given, otherwise drawn without advancing `generator`.

        Args:
            num_images: number of images.
            generator: one for all images or one each; by default torch's global one on the CPU.
            exogenous_noise: the noise, if it is given.
            captions: (num_images, D), embedded captions that the drawn noise is to fit; by default it fits anything.

        Raises:
            ValueError: if the given noise is no tensor or has another shape, or there are several generators but not
                one per image.
        """
        module = self._require_context_module()
        shape = (num_images, *module.noise_shape)
        if exogenous_noise is not None:
            if not isinstance(exogenous_noise, torch.Tensor):
                raise ValueError(
                    f"`exogenous_noise` is of {type(exogenous_noise)}; pass a `torch.Tensor` of shape {shape}."
                )
            if exogenous_noise.shape != shape:
                raise ValueError(
                    f"`exogenous_noise` has the shape {tuple(exogenous_noise.shape)}; {num_images} images of this"
                    f" adapter need {shape}."
                )
            return exogenous_noise
        if captions is None:
            return fork_generator_randn(shape, generator)
        normal = fork_generator_randn((num_images, *module.candidates_shape), generator)
        with self._context_module_on_device() as (module, device):
            return module.choose_noise(normal.to(device), captions.to(device)).cpu()

    def to_json_string(self) -> str:
        """The config as it is saved, under the class name that stock diffusers loads it with."""
        config = json.loads(super().to_json_string()) | {"_class_name": self._plain_class.__name__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _default_size(self, arguments: dict[str, Any]) -> dict[str, int]:
        """Height and width, where they are left open: those of training, or of latents if they have to be told."""
        if "height" not in arguments or "controlnet" in self.components:
            return {}  # an image has the size
        height = width = self._training_resolution
        latents = arguments["latents"]
        if latents is not None and latents.ndim == 4:  # packed ones do not say their size
            if "mask_image" not in arguments and not self._backbone.is_told_size:
                return {}
            height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        return {"height": arguments["height"] or height, "width": arguments["width"] or width}

    def _matches_prompt(self, match_prompt: bool | None, exogenous_noise: torch.Tensor | None) -> bool:
        """Whether to draw noise that fits the prompt."""
        if match_prompt is False or (match_prompt is None and exogenous_noise is not None):
            return False
        if exogenous_noise is not None:
            raise ValueError(
                "`match_prompt` says how to draw `exogenous_noise`, which is given; leave out one of them."
            )
        with self._context_module_on_device() as (module, _):
            learned = module.knows_captions
        if match_prompt and not learned:
            raise ValueError(
                "This context adapter was trained without learning what captions say, for which it takes enough images"
                " with captions that differ; train it again with those, or leave out `match_prompt`."
            )
        return learned

    def _captions_of(self, prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, D) of prompts."""
        if prompt_embeds is not None:
            return embed_captions(prompt_embeds)
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
        captions = Conditioner.of(self).embed_captions(prompts)
        if not all(prompts):
            with self._context_module_on_device() as (module, _):
                # an empty prompt says as much as the average one: nothing
                captions[[not text for text in prompts]] = module.require_captions().mean.to(captions)
        return captions


def _own_parameters() -> list[inspect.Parameter]:
    """What `CompositionMixin.__call__` takes besides the plain pipeline's arguments."""
    ours = inspect.signature(CompositionMixin.__call__, eval_str=True).parameters.values()
    return [parameter for parameter in ours if parameter.kind is parameter.KEYWORD_ONLY]


def _refuse_unknown(given: dict[str, Any], plain: inspect.Signature) -> None:
    parameters = [*plain.parameters.values(), *_own_parameters()]
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        if name not in (*known, *_DEPRECATED):
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise TypeError(f"The pipeline's call got an unexpected keyword argument `{name}`{hint}")


def _with_signature_of(plain_call: Any) -> Any:
    """`CompositionMixin.__call__` for one class, whose signature shows the plain pipeline's arguments too."""

    @functools.wraps(CompositionMixin.__call__)
    def __call__(self, *args, **kwargs):
        return CompositionMixin.__call__(self, *args, **kwargs)

    ours = inspect.signature(CompositionMixin.__call__, eval_str=True)
    parameters = [*_own_parameters(), *inspect.signature(plain_call).parameters.values()]
    signature = ours.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))
    vars(__call__)["__signature__"] = signature
    return __call__


def _with_noise(
    output: Any, noise: torch.Tensor | None, return_dict: bool
) -> ComposablePipelineOutput | tuple[Any, torch.Tensor | None]:
    if not return_dict:
        return output.images, noise
    return ComposablePipelineOutput(output.images, noise, getattr(output, "nsfw_content_detected", None))


def _number_of_prompts(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1
