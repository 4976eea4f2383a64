"""One LoRA, with prompts that name the interventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from beds.bed import Bed
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ctx.adapter.backbones import UNetBackbone
from diffusers_ctx.training.diffusion.trainable import TEXT_LORA_TARGETS

from ..predicting import Predicting, Prediction, Predictor
from ..setting import Sampler, Setting, device
from .lora import LoraTraining, add_lora, load_base, plain_sampler, save_lora


# rare tokens are the usual names of what the text encoder does not know. The base knows no concept of quad, and its
# letters mean so much the same that a LoRA alone did not tell them apart in 400 steps: their embeddings learn too
RARE_TOKENS = "bdfhkz"
_EMBEDDINGS = "rare_tokens.safetensors"


@dataclass(frozen=True)
class PromptLora(Predicting):
    """One LoRA on UNet and text encoder, with prompts that name the intervention, or do not.

    Names are rare tokens whose embeddings learn, as in textual inversion.

    Attributes:
        contexts: contexts that it is trained on, by default all.
        named: whether prompts name the intervention; compositions name several.
    """

    contexts: tuple[str, ...] | None = None
    named: bool = True

    def steps(self, setting: Setting) -> int:
        return setting.baseline_steps

    def train(self, setting: Setting, folder: Path) -> None:
        pipeline = load_base(setting)
        training = LoraTraining(pipeline, setting, folder / "logs", "names")
        parameters = add_lora(pipeline.unet, list(UNetBackbone.lora_targets), "names")
        parameters += add_lora(pipeline.text_encoder, TEXT_LORA_TARGETS, "names")

        def predict(noisy, timesteps, target, rows):
            return training.predict(noisy, timesteps, self.prompts(setting.bed, training, rows)), target

        embeddings = learn_rare_tokens(pipeline, setting)
        contexts = self.contexts or tuple(setting.bed.contexts)
        training.run(parameters, contexts, setting.baseline_steps, predict, embeddings)
        save_lora(pipeline, folder, "names", with_text=True)
        save_file(
            {"rare_tokens": embeddings.detach()[rare_token_rows(pipeline, setting.bed)]},
            folder / "names" / _EMBEDDINGS,
        )

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_prompt_lora(setting, folder)
        return plain_sampler(pipeline, setting, lambda caption, names: self.prompt(setting.bed, caption, names))

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        pipeline = load_prompt_lora(setting, folder)

        def predictor(captions: list[str], interventions: Sequence[str]) -> Prediction:
            prompts = [self.prompt(setting.bed, caption, interventions) for caption in captions]
            text, _ = pipeline.encode_prompt(prompts, device(), 1, do_classifier_free_guidance=False)
            return lambda latents, timestep: pipeline.unet(latents, timestep, text).sample

        return pipeline, predictor

    def prompt(self, bed: Bed, caption: str, interventions: Sequence[str]) -> str:
        return name_concepts(bed, caption, interventions) if self.named else caption

    def prompts(self, bed: Bed, training: LoraTraining, rows: torch.Tensor) -> list[str]:
        """Captions of the images, with the rare tokens of their contexts where prompts name these."""
        contexts = [bed.contexts[training.latents.contexts[row]] for row in rows.tolist()]
        return [self.prompt(bed, caption, names) for caption, names in zip(training.captions(rows), contexts)]


def load_prompt_lora(setting: Setting, folder: Path) -> StableDiffusionPipeline:
    """The base with what a `PromptLora` learned."""
    if not (folder / "names").exists():
        raise FileNotFoundError(f"Run the method '{folder.name}' first: its LoRA is needed, and {folder} has none.")
    pipeline = load_base(setting)
    pipeline.load_lora_weights(folder / "names", weight_name="pytorch_lora_weights.safetensors", adapter_name="names")
    with torch.no_grad():
        embeddings = pipeline.text_encoder.get_input_embeddings().weight
        embeddings[rare_token_rows(pipeline, setting.bed)] = load_file(folder / "names" / _EMBEDDINGS)[
            "rare_tokens"
        ].to(device())
    return pipeline


def name_concepts(bed: Bed, caption: str, interventions: Sequence[str]) -> str:
    """The caption, followed by the rare tokens of the interventions."""
    return ", ".join([caption, *(RARE_TOKENS[bed.concepts.index(name)] for name in interventions)])


def rare_token_rows(pipeline: StableDiffusionPipeline, bed: Bed) -> torch.Tensor:
    """The rows (K,) of the text encoder's embeddings that stand for concepts."""
    return torch.tensor([pipeline.tokenizer(token).input_ids[1] for token in RARE_TOKENS[: len(bed.concepts)]])


def learn_rare_tokens(pipeline: StableDiffusionPipeline, setting: Setting) -> torch.nn.Parameter:
    """Lets the embeddings of the rare tokens learn, from new values far enough apart; returns all embeddings."""
    embeddings = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    rows = rare_token_rows(pipeline, setting.bed)
    with torch.no_grad():
        new = torch.randn(len(rows), embeddings.shape[1], generator=torch.Generator().manual_seed(setting.seed))
        embeddings[rows] = new.to(embeddings.device)
    learning = torch.zeros(len(embeddings), 1, device=embeddings.device)
    learning[rows] = 1
    embeddings.register_hook(lambda gradient: gradient * learning)
    return embeddings
