"""What images would have been under other interventions: abduction, action and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ctx.autoencoding import decode_latents, to_pixels
from diffusers_ctx.context import Interventions, Summand

from .abduction import AbductionMixin
from .callbacks import StepCallback, callback_inputs, keeping_images
from .conditioning import Conditioner
from .edit import OnPath, contrast
from .inversion import Model, denoise, inverse_path
from .outputs import ComposablePipelineOutput
from .references import ReferencedInterventions, number_of_sets, split_references


class CounterfactualMixin(AbductionMixin):
    """Adds counterfactuals of images to a pipeline with a context adapter."""

    @torch.no_grad()
    def counterfactual(
        self,
        image: PipelineImageInput,
        interventions: ReferencedInterventions | Sequence[ReferencedInterventions] = None,
        factual_interventions: Interventions | Sequence[Interventions] = None,
        prompt: str | list[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        mask_image: PipelineImageInput | None = None,
        context_guidance_scale: float = 1.0,
        add_scores: bool | None = None,
    ) -> ComposablePipelineOutput | tuple:
        r"""What given images would have been under other interventions.

        Abduction infers the concepts' exogenous noise by the posterior, and the diffusion noise by inverting the
        denoising ODE. Action replaces the factual mechanisms by those of `interventions`. Prediction generates from
        both noises. Equal interventions return the images, as far as the VAE and the inversion can.

        Guidance above 1 is not used in the inversion, which it would make less exact. Instead, the factual image is
        generated too, with guidance, and its deviation from the inversion's path is added to both at each step: equal
        interventions still return the images.

        Args:
            image: one image or several, see `infer_exogenous_noise`.
            interventions: those of the counterfactual, as in `__call__`; or, for a single image, several sets of them
                in a list, each of which makes a counterfactual of it.
            factual_interventions: those under which the images arose.
            prompt: describes the images; one for all or one each.
            num_inference_steps: steps of the inversion, and of the generation.
            guidance_scale: classifier-free guidance of the generation; 1 or less is none.
            negative_prompt: what guidance leads away from; one for all or one each.
            generator: draws the exogenous noise from its posterior: repeated calls show how much the images leave
                open. By default the noise is the posterior's mean, and the result deterministic.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`ComposablePipelineOutput`] instead of a tuple of images and exogenous
                noise.
            callback_on_step_end: called after each step of the generation with the pipeline, the step's number, its
                timestep and a dictionary of tensors; `"latents"` in what it returns replaces them.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback; only `"latents"` is available.
            mask_image: where the images may change, as in inpainting: white may, black is kept to the pixel, and grey
                mixes the two. One for all or one each, of the images' size; PIL images are resized and cropped with
                them.
            context_guidance_scale: amplifies (above 1) or weakens (below 1) the contrast between `interventions` and
                `factual_interventions`: 0 returns the images. 1 costs nothing.
            add_scores: as in `__call__`.

        Raises:
            ValueError: if no adapter is loaded, a concept is unknown, numbers of prompts, masks or generators do not
                fit, `num_inference_steps` is below 1, or the callback asks for other tensors.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}; it must be 1 or more.")
        names = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        unknown = set(names) - {"latents"}
        if unknown:
            raise ValueError(f"Callbacks of counterfactuals are given `latents`, and no {sorted(unknown)}.")
        pixels = self._preprocess(image)
        num_images = len(pixels)
        copies = (number_of_sets(interventions) or 1) if num_images == 1 else 1
        interventions, references = split_references(interventions, num_images * copies)
        factual_mask = self._mask(factual_interventions, num_images)
        mask = self._mask(interventions, num_images * copies)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"`generator` has {len(generator)} entries for {num_images} images.")
        region = None if mask_image is None else self._region(mask_image, pixels)
        texts = _one_each(prompt, num_images, "prompt")
        negative = _one_each(negative_prompt or "", num_images, "negative_prompt") if guidance_scale > 1 else []

        latents = self._encode_images(pixels)
        posterior = self._posterior(pixels, latents, factual_mask)
        noise = posterior.mean
        if generator is not None:
            noise = posterior.at(randn_tensor(noise.shape, generator, noise.device, noise.dtype))
        inverted = self._model(self._summands(noise, factual_mask, add_scores), latents, texts)
        factual = (_repeat(noise, copies), _repeat(factual_mask, copies))
        noise = self._transplant(factual[0], references)
        wanted, texts, negative = (noise, mask), texts * copies, negative * copies
        if negative:  # the factual images first
            wanted, factual = ([torch.cat(pair) for pair in zip(factual, other)] for other in (wanted, factual))
            texts, negative = texts * 2, negative * 2
        model = self._model(self._summands(*wanted, add_scores), latents, texts, negative, guidance_scale)
        if context_guidance_scale != 1:
            origin = self._model(self._summands(*factual, add_scores), latents, texts, negative, guidance_scale)
            model = contrast(model, origin, context_guidance_scale)

        noising = self._backbone.noising(self.scheduler.config)
        steps = noising.steps(num_inference_steps, latents)
        # in single precision, or generation would not undo the inversion
        path = inverse_path(inverted, latents.float(), steps)

        def callback(step: int, timestep: float, sample: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return sample
            checked = keeping_images(callback_on_step_end, len(sample))
            return checked(self, step, timestep, dict.fromkeys(names, sample)).get("latents", sample)

        on_step = OnPath(path, callback, bool(negative), region)
        self._num_timesteps, self._interrupt = num_inference_steps, False  # callbacks use them, as in a call
        is_interrupted = lambda: self._interrupt  # noqa: E731
        with self._scaled_for_call():
            x = _repeat(path[0], len(texts) // num_images)
            predicted = denoise(model, x, steps, on_step, is_interrupted)[-len(mask) :]
        images = predicted.to(latents.dtype)
        if output_type != "latent":
            decoded = decode_latents(self.vae, images)
            if region is not None:
                decoded = torch.lerp(pixels.to(decoded), decoded.clamp(-1, 1), region.to(decoded))
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ComposablePipelineOutput(images, noise) if return_dict else (images, noise)

    def _model(
        self,
        summands: list[Summand],
        latents: torch.Tensor,
        texts: list[str],
        negative: Sequence[str] = (),
        guidance_scale: float = 1.0,
    ) -> Model:
        """The backbone under contexts' tokens and texts; with negative ones, guided away from these."""
        conditioner = Conditioner.of(self)
        texts = [*negative, *texts]
        geometry = conditioner.full_image_geometry(latents[:1]).repeat(len(texts), 1)
        conditions = conditioner.model_kwargs(conditioner.encode_captions(texts), geometry)
        models = [self._guided_model(conditions, summand.tokens, guidance_scale) for summand in summands]

        def model(x: torch.Tensor, t: float) -> torch.Tensor:
            predictions = [summand.weigh(one(x, t)) for summand, one in zip(summands, models)]
            return torch.stack(predictions).sum(dim=0)

        return model

    def _guided_model(self, conditions: dict[str, Any], tokens: torch.Tensor, guidance_scale: float) -> Model:
        """The backbone under a context's tokens; with guidance, the unconditional half of `conditions` comes first."""
        copies = 2 if guidance_scale > 1 else 1  # of the context, which guidance leaves alone
        backbone = self._backbone
        kwargs = backbone.with_tokens(conditions, tokens)

        def model(x: torch.Tensor, t: float) -> torch.Tensor:
            predicted = backbone.predict(torch.cat([x] * copies).to(tokens.dtype), t, kwargs)
            if copies == 1:
                return predicted
            unconditional, conditional = predicted.chunk(2)
            return unconditional + guidance_scale * (conditional - unconditional)

        return model

    def _region(self, mask_image: PipelineImageInput, pixels: torch.Tensor) -> torch.Tensor:
        """How much each pixel may change (B or 1, 1, H, W), in [0, 1]."""
        mask = (
            to_pixels(mask_image, self.image_processor, self._training_resolution).mean(dim=1, keepdim=True) / 2 + 0.5
        )
        if mask.shape[2:] != pixels.shape[2:] or len(mask) not in (1, len(pixels)):
            raise ValueError(
                f"`mask_image` is {len(mask)} of height and width {tuple(mask.shape[2:])}, for {len(pixels)} images of"
                f" {tuple(pixels.shape[2:])}; give one for all or one each, of their size."
            )
        return mask


def _one_each(texts: str | list[str], num_images: int, name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts] * num_images
    if len(texts) != num_images:
        raise ValueError(f"`{name}` has {len(texts)} entries for {num_images} images; give one for all or each.")
    return list(texts)


def _repeat(rows: torch.Tensor, copies: int) -> torch.Tensor:
    """Rows, several times over; once they are what they were, down to the layout in memory that sums depend on."""
    return rows if copies == 1 else torch.cat([rows] * copies)
