"""What the composing pipelines of all backbones share: context tokens, abduction and counterfactuals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import ImageOps
from PIL.Image import Image, Resampling

from diffusers_ctx.adapter import (
    ContextAdapterLoaderMixin,
    add_context_tokens,
    check_no_disk_offload,
    lora_detached,
    on_device,
)
from diffusers_ctx.adapter.image_features import ClipFeatures, ImageFeatures, UNetFeatures
from diffusers_ctx.context import ContextModule, Interventions, embed_captions, intervention_mask

from .guidance import context_guidance
from .inversion import denoise, evenly_spaced_timesteps, invert
from .noise import fork_generator_randn


_CANDIDATES = 64  # of exogenous noise, of which the prompt chooses


@dataclass
class ComposablePipelineOutput(StableDiffusionPipelineOutput):
    """Images, and the exogenous noise (B, N, d_z) that they were made from: pass it in again to keep everything that
    an intervention does not touch. `None` without a context adapter."""

    exogenous_noise: torch.Tensor | None = None


class CompositionMixin(ContextAdapterLoaderMixin):
    """Gives a text-to-image pipeline of diffusers interventions on the concepts of a context adapter.

    A pipeline says by `plain_class` which one of diffusers it extends, and by `encode_captions` and `unet_conditions`
    what its UNet is told.
    """

    plain_class: type[DiffusionPipeline]
    vae: AutoencoderKL
    vae_scale_factor: int
    image_processor: VaeImageProcessor
    maybe_free_model_hooks: Callable[[], None]
    to: Callable[..., Any]
    _execution_device: torch.device
    _clip_features: ClipFeatures | None = None  # what `load_posterior_encoder` has loaded

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the text encoders make of captions: tensors with a row for each, on the pipeline's device."""
        raise NotImplementedError

    def unet_conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        """What the UNet is told of images beside their context, as keyword arguments of its call.

        Args:
            encoded: their captions, from `encode_captions`.
            geometry: (B, 6), each image's original height and width, top and left of its crop, and height and width,
                in pixels. Not every backbone asks for it.
        """
        raise NotImplementedError

    def _generate(
        self,
        plain_call: Callable[..., Any],
        arguments: dict[str, Any],
        interventions: Interventions | Sequence[Interventions],
        exogenous_noise: torch.Tensor | None,
        context_guidance_scale: float,
        match_prompt: bool,
    ) -> ComposablePipelineOutput | tuple:
        """Calls the plain pipeline with `arguments`, all of its own, under interventions."""
        if self.context_module is None:
            if interventions or exogenous_noise is not None or match_prompt or context_guidance_scale != 1:
                self._require_context_module()
            return _with_noise(plain_call(**arguments), None) if arguments["return_dict"] else plain_call(**arguments)
        if arguments["ip_adapter_image"] is not None or arguments["ip_adapter_image_embeds"] is not None:
            raise ValueError(
                "A context adapter is loaded in the place of an IP-Adapter; unload it to pass its images."
            )
        arguments |= self._default_size(arguments)
        num_prompts = _number_of_prompts(arguments["prompt"], arguments["prompt_embeds"])
        images_per_prompt = arguments["num_images_per_prompt"]
        mask = self._mask(interventions, num_prompts).repeat_interleave(images_per_prompt, dim=0)
        captions = None
        if match_prompt:
            captions = self._captions_of(arguments["prompt"], arguments["prompt_embeds"])
            captions = captions.repeat_interleave(images_per_prompt, dim=0)
        noise = self.prepare_exogenous_noise(len(mask), arguments["generator"], exogenous_noise, captions)
        tokens = self._context_tokens(noise, mask)
        guided = arguments["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        arguments = arguments | {"ip_adapter_image_embeds": [torch.cat([tokens] * (2 if guided else 1))]}
        with ExitStack() as stack:
            if context_guidance_scale != 1:
                observational = self._context_tokens(noise, torch.zeros_like(mask))
                stack.enter_context(context_guidance(self.unet, observational, context_guidance_scale))
            output = plain_call(**arguments)
        return _with_noise(output, noise) if arguments["return_dict"] else (*output, noise)

    def _default_size(self, arguments: dict[str, Any]) -> dict[str, int]:
        """Height and width, where they are left open: those of training, or of given latents if the UNet asks."""
        height = width = self.training_resolution
        if arguments["latents"] is not None:
            if self.unet.config.addition_embed_type != "text_time":
                return {}
            height, width = (side * self.vae_scale_factor for side in arguments["latents"].shape[-2:])
        return {"height": arguments["height"] or height, "width": arguments["width"] or width}

    @property
    def training_resolution(self) -> int:
        """Height and width, in pixels, of the images that the adapter was trained on."""
        return self._require_context_module().config.posterior_sample_size * self.vae_scale_factor

    def image_features(self, encoder: str) -> ImageFeatures | None:
        """What a posterior sees of images; `None` if it sees their latents.

        Args:
            encoder: `"vae"`, `"unet"` or `"clip"`, see `posterior_encoder` of [`ContextModule`].

        Raises:
            ValueError: if the model is not there and cannot be loaded.
        """
        if encoder == "vae":
            return None
        if encoder == "unet":
            return UNetFeatures(self.unet, list(self.text_encoders.values()), self._unconditional_kwargs)
        if self._clip_features is None and getattr(self, "image_encoder", None) is not None:
            return ClipFeatures(self.image_encoder)
        if self._clip_features is None:
            self.load_posterior_encoder()
        return self._clip_features

    def load_posterior_encoder(
        self, pretrained_model_name_or_path: str | None = None, cache_dir: str | os.PathLike | None = None
    ) -> None:
        """Loads the CLIP image encoder that the posterior of an adapter sees images through.

        Abduction and counterfactuals call it by themselves, if the adapter needs it and the pipeline has no component
        `image_encoder`; nothing else needs it.

        Args:
            pretrained_model_name_or_path: folder or Hub id; by default what the adapter was trained with, which names
                a local folder without its path.
            cache_dir: where downloads are kept.

        Raises:
            ValueError: if it cannot be loaded, or no adapter is loaded that could name it.
        """
        name = pretrained_model_name_or_path or self._require_context_module().config.posterior_encoder_model
        if name is None:
            raise ValueError(
                "The adapter's posterior sees images through the image encoder of the pipeline that it was trained on:"
                " load one that has it as component `image_encoder`, or name the CLIP model."
            )
        self._clip_features = ClipFeatures.from_pretrained(name, cache_dir)

    def unload_context_adapter(self) -> None:
        super().unload_context_adapter()
        self._clip_features = None

    def to_json_string(self) -> str:
        """The config as it is saved, under the name of the class that stock diffusers loads it with."""
        config = json.loads(super().to_json_string()) | {"_class_name": self.plain_class.__name__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def prepare_exogenous_noise(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        exogenous_noise: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The concepts' noise (num_images, N, d_z): checked if given, else drawn, without advancing a `generator`.

        Args:
            num_images: how many images.
            generator: what to draw with, one for all or one each; torch's own on the CPU if there is none.
            exogenous_noise: the noise, if it is known.
            captions: (num_images, D) from `embed_captions`, of what is drawn; by default everything.

        Raises:
            ValueError: if the given noise is no tensor, has another shape, or was to go with captions; or there are
                several generators but not one per image.
        """
        shape = (num_images, *self._require_context_module().noise_shape)
        if exogenous_noise is not None:
            if captions is not None:
                raise ValueError(
                    "`match_prompt` says how to draw `exogenous_noise`, which is given; leave out one of them."
                )
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
        # candidates, and a number each to choose by
        numbers = fork_generator_randn((num_images, _CANDIDATES, shape[1] * shape[2] + 1), generator)
        candidates, uniform = numbers[..., :-1].unflatten(-1, shape[1:]), torch.special.ndtr(numbers[..., -1])
        with self._module_at_hand() as (module, device):
            return module.choose_noise(candidates.to(device), captions.to(device), uniform.to(device)).cpu()

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        """What noise is drawn by that goes with captions (B, D), from the pretrained text encoders."""
        with ExitStack() as stack:
            for text_encoder in self.text_encoders.values():
                stack.enter_context(lora_detached(text_encoder))
            return embed_captions(self.encode_captions(captions)["text"])

    def _captions_of(self, prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, D) of prompts."""
        if prompt_embeds is not None:
            return embed_captions(prompt_embeds)
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
        captions = self.embed_captions(prompts)
        if not all(prompts):
            with self._module_at_hand() as (module, _):  # no prompt says as much as the average one: nothing
                captions[[not text for text in prompts]] = module.require_captions().mean.to(captions)
        return captions

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
    ):
        if self.context_module is None:
            return super().prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
            )
        # context tokens come with a row per image already: unlike image prompts, each image has noise of its own
        return ip_adapter_image_embeds

    @torch.no_grad()
    def infer_exogenous_noise(
        self, image: PipelineImageInput, factual: Interventions | Sequence[Interventions] = None
    ) -> torch.Tensor:
        """The exogenous noise (B, N, d_z) that explains images: the mean of the posterior.

        Args:
            image: one image or several, as PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W). PIL images are
                fitted to the size that the adapter was trained on, as in training; arrays and tensors keep their size.
                Their values lie in [0, 1], and those of integers in 0 to 255.
            factual: the interventions under which they came about; none if they are observational.
        """
        pixels = self._preprocess(image)
        noise = self._infer_noise(pixels, self._encode_images(pixels), factual)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def counterfactual(
        self,
        image: PipelineImageInput,
        interventions: Interventions | Sequence[Interventions] = None,
        factual: Interventions | Sequence[Interventions] = None,
        prompt: str | list[str] = "",
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ComposablePipelineOutput | tuple:
        r"""What given images would have been under other interventions.

        Abduction: the posterior gives the concepts' exogenous noise, the inverted ODE the diffusion noise. Action: the
        mechanisms of `interventions` take the place of the factual ones. Prediction: both noises are run forward.

        Args:
            image: one image or several, see `infer_exogenous_noise`.
            interventions: the counterfactual context, as in `__call__`; equal to `factual`, it gives the images back.
            factual: the interventions under which the images came about.
            prompt: describes the images; one for all or one each.
            num_inference_steps: steps of the inversion and of the regeneration.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`ComposablePipelineOutput`].

        Raises:
            ValueError: if no adapter is loaded, a concept is unknown, shapes do not fit, or there is no step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}; it must be 1 or more.")
        pixels = self._preprocess(image)
        latents = self._encode_images(pixels)
        noise = self._infer_noise(pixels, latents, factual)
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else prompt
        if len(prompts) != len(latents):
            raise ValueError(
                f"`prompt` has {len(prompts)} entries for {len(latents)} images; give one for all or each."
            )
        conditions = self.unet_conditions(self.encode_captions(prompts), self.full_image_geometry(latents))
        # the noise schedule alone, whichever scheduler samples: not every class builds all of them
        alphas = DDIMScheduler.from_config(self.scheduler.config).alphas_cumprod.to(latents.device)
        prediction_type = self.scheduler.config.prediction_type
        timesteps = evenly_spaced_timesteps(self.scheduler.config.num_train_timesteps, num_inference_steps)

        def model_under(context):
            tokens = self._context_tokens(noise, self._mask(context, len(latents)))

            def model(x, t):
                return self.unet(x.to(tokens.dtype), t, **add_context_tokens(conditions, tokens), return_dict=False)[0]

            return model

        # in single precision, or the steps back would not be undone by those forward
        diffusion_noise = invert(model_under(factual), latents.float(), alphas, timesteps, prediction_type)
        predicted = denoise(model_under(interventions), diffusion_noise, alphas, timesteps, prediction_type)
        images = predicted.to(latents.dtype)
        if output_type != "latent":
            images = self.decode_images(images, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, None, noise
        return ComposablePipelineOutput(images=images, nsfw_content_detected=None, exogenous_noise=noise)

    @torch.no_grad()
    def decode_images(self, latents: torch.Tensor, output_type: str = "np") -> Any:
        """Images of scaled latents (B, C, h, w), as `"pil"`, `"np"` or `"pt"`, in a precision that the VAE bears."""
        with self._vae_in_range(), torch.autocast(latents.device.type, enabled=False):
            decoded = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def _mask(self, interventions: Interventions | Sequence[Interventions], num_rows: int) -> torch.Tensor:
        config = self._require_context_module().config
        return intervention_mask(interventions, config.concepts, num_rows, config.obs_context)

    def _context_tokens(self, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with self._module_at_hand() as (module, device):
            return module(noise.to(device), mask.to(device))

    def _infer_noise(
        self, pixels: torch.Tensor, latents: torch.Tensor, factual: Interventions | Sequence[Interventions]
    ) -> torch.Tensor:
        mask = self._mask(factual, len(latents))
        seen = self._posterior_input(pixels, latents)
        with self._module_at_hand() as (module, device):
            return module.posterior(seen.to(device), mask.to(device)).mean

    @contextmanager
    def _module_at_hand(self) -> Iterator[tuple[ContextModule, torch.device]]:
        """The context module and the device that its weights are on while this is open."""
        module, device = self._require_context_module(), self._execution_device
        check_no_disk_offload(self.unet)
        self._warn_of_inactive_lora()
        with on_device(module, device):
            yield module, device

    def _posterior_input(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        config = self._require_context_module().config
        image_features = self.image_features(config.posterior_encoder)
        if image_features is None:
            return latents
        if image_features.channels != config.posterior_in_channels:
            raise ValueError(
                f"The image encoder has features of {image_features.channels} channels, and the adapter's posterior"
                f" sees {config.posterior_in_channels}: call `load_posterior_encoder(...)` with the CLIP model that it"
                f" was trained with, {config.posterior_encoder_model or 'the image encoder of its base model'}."
            )
        return image_features(pixels.to(self._execution_device), latents)

    def _unconditional_kwargs(self, latents: torch.Tensor) -> dict[str, Any]:
        return self.unet_conditions(self.encode_captions([""] * len(latents)), self.full_image_geometry(latents))

    def _preprocess(self, image: PipelineImageInput) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1]; PIL images are brought to the adapter's size as `ImageTransform` does it."""
        side = self.training_resolution

        def fit(entry: Any) -> Any:
            if isinstance(entry, np.ndarray) and np.issubdtype(entry.dtype, np.integer):
                return entry.astype(np.float32) / 255
            if isinstance(entry, torch.Tensor) and not entry.is_floating_point():
                return entry.float() / 255
            if not isinstance(entry, Image):
                return entry
            return ImageOps.fit(ImageOps.exif_transpose(entry).convert("RGB"), (side, side), Resampling.LANCZOS)

        return self.image_processor.preprocess([fit(x) for x in image] if isinstance(image, list) else fit(image))

    def _encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        dtype = self.vae.dtype
        with self._vae_in_range():
            encoded = self.vae.encode(pixels.to(device=self._execution_device, dtype=self.vae.dtype))
        return (retrieve_latents(encoded, sample_mode="argmax") * self.vae.config.scaling_factor).to(dtype)

    @contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        """While it is open, a VAE that overflows in half precision is in single precision."""
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 and self.vae.config.force_upcast
        if overflows:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if overflows:
                self.vae.to(dtype)

    def full_image_geometry(self, latents: torch.Tensor) -> torch.Tensor:
        """The geometry (B, 6) of whole images with these latents."""
        size = [side * self.vae_scale_factor for side in latents.shape[2:]]
        return torch.tensor([*size, 0, 0, *size]).repeat(len(latents), 1)


def _with_noise(output: Any, noise: torch.Tensor | None) -> ComposablePipelineOutput:
    return ComposablePipelineOutput(output.images, getattr(output, "nsfw_content_detected", None), noise)


def _number_of_prompts(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1
