"""Options of a training run. Their names are the flags of the command line, as in diffusers' own scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.constants import HF_HOME

from ..adapter_format import Injection, Mode
from ..context import PosteriorEncoder
from ..context.names import normal_name
from ..options import OptionGroup, option, path_option


PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSampling = Literal["uniform", "logit_normal", "high_noise"]
Optimizer = Literal["adamw", "adamw_8bit", "prodigy"]
# diffusers' schedules except piecewise_constant, which takes rules that no option gives
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
CausalForm = Literal["structural", "reduced_form"]
PosteriorType = Literal["inverse", "amortized"]
MixedPrecision = Literal["no", "fp16", "bf16"]


FEWEST_CONCEPT_STEPS, MOST_CONCEPT_STEPS = 300, 1500


@dataclass
class ModelConfig(OptionGroup):
    """The base model and what of it learns."""

    pretrained_model_name_or_path: str = path_option(MISSING, "Local folder or Hub id of a Stable Diffusion.")
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.")
    variant: str | None = option(None, "Variant of the model files, such as fp16.")
    mode: Mode = option(
        "lora", "What learns: the adapter alone (frozen), a LoRA too (lora), or all of the UNet or transformer (full)."
    )
    rank: int = option(16, "Rank of the LoRA.", at_least=1)
    train_text_encoder: bool = option(False, "In mode lora, learn a LoRA of the text encoders too.")
    injection: Injection | None = option(
        None,
        "How context tokens reach the base model: through attention layers of their own (cross_attention) or appended"
        " to the prompt (prompt). By default cross_attention, and prompt for transformers.",
    )
    unfreeze_after: float | None = option(
        None,
        "In modes lora and full, the share of training before the base learns too. By default 0.2, or 0 if the UNet"
        " has to learn another noise schedule.",
        at_least=0,
        below=1,
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "Use xformers' attention (CUDA only).")
    prediction_type: PredictionType | None = option(
        None, "What the UNet learns to predict; by default what the base model predicts."
    )
    rescale_betas_zero_snr: bool = option(False, "Train with zero terminal SNR: the last timestep is pure noise.")
    gradient_checkpointing: bool = option(False, "Save memory by computing activations twice.")


@dataclass
class DataConfig(OptionGroup):
    """The images and how they are read."""

    train_data_dir: str | None = path_option(None, "Folder with one sub-folder of images per context.")
    dataset_name: str | None = path_option(None, "Dataset on the Hub or on disk, instead of a folder.")
    dataset_config_name: str | None = option(None, "The dataset's configuration, if it has several.")
    dataset_split: str = option("train", "The dataset's split.")
    image_column: str = option("image", "The dataset's column of images.")
    context_column: str = option("context", "The dataset's column of context names.")
    caption_column: str = option("text", "The column of captions, in datasets and in metadata files.")
    obs_context: str = option("obs", "Name of the observational context.")
    concepts: list[str] | None = option(
        None, "Concepts to learn, in order; by default all that the contexts intervene on."
    )
    max_train_samples: int | None = option(None, "Use at most this many images of each context.", at_least=1)
    validation_images: int = option(0, "Images per context held out for validation.", at_least=0)
    skip_unreadable: bool = option(False, "Leave out images that cannot be read, instead of stopping.")
    resolution: int | None = option(
        None, "Height and width to resize and crop images to; by default the model's own.", at_least=1
    )
    center_crop: bool = option(False, "Crop the centre; by default each image is cropped at its own random place.")
    random_flip: bool = option(False, "Flip images left to right at random.")
    proportion_empty_prompts: float = option(
        0.1, "Share of captions dropped, for classifier-free guidance.", at_least=0, at_most=1
    )
    cache_latents: bool = option(
        False, "Keep encoded images on disk, and encoded captions unless text encoders learn; each is encoded once."
    )
    dataloader_num_workers: int = option(0, "Image-loading workers; 0 loads in the main process.", at_least=0)
    streaming: bool = option(False, "Read images as they are needed, for collections that do not fit on the disk.")
    streaming_concept_images: int = option(
        1000, "With streaming, the images per context that the concepts are learned on.", at_least=1
    )
    streaming_shuffle_buffer: int = option(
        256, "With streaming, the size of each context's shuffle buffer, in images.", at_least=1
    )
    cache_dir: str | None = path_option(None, "Folder for downloads and encoded images; by default the Hub's cache.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.obs_context = normal_name(self.obs_context)
        self.concepts = self.concepts and [normal_name(concept) for concept in self.concepts]

    @property
    def encoding_dir(self) -> Path | None:
        """Folder where encoded images and captions are kept, or `None` if they are not."""
        return Path(self.cache_dir or HF_HOME) / "context-latents" if self.cache_latents else None

    def source_options(self) -> dict[str, Any]:
        """Keyword arguments that name the images, for `load_context_dataset` and `open_stream`."""
        return {
            "source": Path(self.train_data_dir) if self.train_data_dir else str(self.dataset_name),
            "image_column": self.image_column,
            "context_column": self.context_column,
            "text_column": self.caption_column,
            "name": self.dataset_config_name,
            "split": self.dataset_split,
            "cache_dir": self.cache_dir,
        }


@dataclass
class ContextConfig(OptionGroup):
    """The context module and how it learns the concepts."""

    causal_form: CausalForm = option(
        "structural", "Causal layer: a structural causal model (structural) or the paper's form (reduced_form)."
    )
    graph: list[str] | None = option(None, "Edges `cause->effect` of a known graph; by default the graph is learned.")
    num_hidden_factors: int = option(4, "Factors that no context intervenes on.", at_least=0)
    noise_dim: int = option(1, "Dimensions of each concept's exogenous noise.", at_least=1)
    tokens_per_concept: int = option(1, "Tokens that each concept gives to the base model.", at_least=1)
    posterior_type: PosteriorType = option(
        "inverse", "Posterior of the exogenous noise: the mechanisms inverted (inverse), or a network (amortized)."
    )
    posterior_encoder: PosteriorEncoder | None = option(
        None,
        "Input of the posterior: latents (vae), or features of the UNet (unet), of the transformer that a base has in"
        " its place (transformer), or of a CLIP image encoder (clip). By default the base model's, or clip if a model"
        " is named; vae in mode full, with streaming, and for a UNet without a middle block.",
    )
    posterior_encoder_model: str | None = path_option(
        None, "Local folder or Hub id of the CLIP model; by default the image encoder of the pipeline, if it has one."
    )
    expressive_depth: int = option(
        0, "Layers between mechanism and causal layer; more than 0 needs an amortized posterior.", at_least=0
    )
    kl_weight: float = option(1.0, "Weight β of the KL divergence, relative to the likelihood.", at_least=0)
    kl_warmup_steps: int = option(100, "Steps over which β grows from zero.", at_least=1)
    contrastive_weight: float = option(30.0, "Weight of the contrastive loss between contexts.", at_least=0)
    matching_weight: float = option(
        50.0, "Weight of prior matching: the distance of each context's noise to its prior.", at_least=0
    )
    generation_weight: float = option(
        500.0, "Weight of the distance between each context's images and decoded samples of the prior.", at_least=0
    )
    acyclicity_weight: float = option(10.0, "Weight of the penalty on cycles of a learned graph.", at_least=0)
    sparsity_weight: float = option(
        0.0,
        "Weight of the group lasso on the edges of the causal layer; the causal fit of a learned graph adds 0.03.",
        at_least=0,
    )
    concept_steps: int | None = option(
        None,
        "Steps in which the concepts are learned with a light decoder, before the rest. By default 1.5 for each image"
        " of the smallest context, from 300 to 1500: with more, few images are learned by heart.",
        at_least=2,  # one for the code and one for all terms
    )
    try_noise: bool = option(
        True,
        "With fewer than 300 images in the smallest context, hold out an eighth, and do without exogenous noise unless"
        " these confirm it.",
    )
    concept_batch_size: int = option(336, "Images per such step, all contexts together.", at_least=1)
    concept_learning_rate: float = option(
        3e-3,
        "Peak learning rate of these steps; at their end, mechanisms and graph learn ten times as fast.",
        above=0,
    )

    def concept_steps_for(self, contexts: Sequence[str]) -> int:
        """The steps for images of these contexts."""
        if self.concept_steps is not None:
            return self.concept_steps
        smallest = min(Counter(contexts).values())
        return min(max(round(1.5 * smallest), FEWEST_CONCEPT_STEPS), MOST_CONCEPT_STEPS)


@dataclass
class OptimizationConfig(OptionGroup):
    """How the adapter is trained with the diffusion loss."""

    seed: int = option(
        0, "Seed of all random numbers, except for the choice of held-out images.", at_least=0, at_most=2**32 - 1
    )
    train_batch_size: int = option(16, "Images per step and process.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", at_least=1)
    num_train_epochs: int = option(100, "Epochs, unless max_train_steps is given.", at_least=1)
    max_train_steps: int | None = option(None, "Optimizer steps.", at_least=1)
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0)
    scale_lr: bool = option(False, "Multiply the learning rate by processes, accumulation and batch size.")
    lr_scheduler: Schedule = option("constant", "The learning-rate schedule.")
    lr_warmup_steps: int | None = option(
        None, "Warm-up steps of the schedule, by default 500; the schedule constant has none.", at_least=0
    )
    snr_gamma: float | None = option(None, "γ of min-SNR weighting; 5.0 is usual.", above=0)
    composition_weight: float | None = option(
        None,
        "Weight of the composition loss: that interventions together change the prediction by the sum of what each of"
        " them does. By default 1 where the adapter does without exogenous noise, and 0 otherwise.",
        at_least=0,
    )
    timestep_sampling: TimestepSampling = option("uniform", "Distribution of the timesteps.")
    noise_offset: float = option(0.0, "Standard deviation of an offset of the noise per image and channel.")
    optimizer: Optimizer = option(
        "adamw", "The optimizer; adamw_8bit needs the package bitsandbytes, prodigy needs prodigyopt."
    )
    adam_beta1: float = option(0.9, "β1 of the optimizer.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "β2 of the optimizer.", at_least=0, below=1)
    adam_weight_decay: float = option(1e-2, "Weight decay of the optimizer.", at_least=0)
    adam_epsilon: float = option(1e-8, "ε of the optimizer.", above=0)
    max_grad_norm: float = option(1.0, "Norm to clip gradients to; `inf` does not clip them.", above=0, infinite=True)
    use_ema: bool = option(False, "Validate with and save an exponential moving average of the learned weights.")
    ema_decay: float = option(0.9999, "Decay of the average after its warm-up.", at_least=0, at_most=1)
    mixed_precision: MixedPrecision | None = option(None, "Mixed precision; by default Accelerate's setting.")
    allow_tf32: bool = option(False, "Allow TF32 on Ampere GPUs.")

    def peak_learning_rate(self, global_batch_size: int) -> float:
        """The learning rate after the warm-up, for batches of `global_batch_size` images over all processes."""
        scale = global_batch_size * self.gradient_accumulation_steps if self.scale_lr else 1
        return self.learning_rate * scale


@dataclass
class OutputConfig(OptionGroup):
    """Where the run writes, and what it logs and validates."""

    output_dir: str = path_option("context-adapter", "Folder for the adapter, its checkpoints and logs.")
    logging_dir: str = path_option("logs", "Folder for the trackers; a relative one lies within output_dir.")
    report_to: str = option("tensorboard", "Name of an installed tracker, `all` or `none`.")
    checkpointing_steps: int = option(
        500, "Steps between checkpoints; there is always one before the first step and one after the last.", at_least=1
    )
    checkpoints_total_limit: int | None = option(None, "Keep at most this many checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = path_option(None, "A checkpoint's folder, or `latest`.")
    validation_prompt: str | None = option(None, "Prompt of the validation images; without one, none are drawn.")
    validation_interventions: list[str] | None = option(
        None, "Compositions to draw in a validation besides the single contexts, such as `night+snow`."
    )
    validation_steps: int = option(500, "Steps between validations.", at_least=1)
    num_validation_images: int = option(4, "Images per context in a validation.", at_least=1)
    validation_guidance_scale: float = option(7.5, "Classifier-free guidance of the validation images.")
    push_to_hub: bool = option(False, "Push the adapter to the Hub when training has finished.")
    hub_token: str | None = option(None, "Token with write access; by default that of `hf auth login`.")
    hub_model_id: str | None = option(None, "Repository to push to; by default the name of output_dir.")


@dataclass
class TrainingConfig:
    """All options of a run.

    Raises:
        ValueError: if options contradict one another.
    """

    model: ModelConfig
    data: DataConfig
    context: ContextConfig = field(default_factory=ContextConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if (self.data.train_data_dir is None) == (self.data.dataset_name is None):
            raise ValueError("Give either `train_data_dir` or `dataset_name`.")
        if self.model.train_text_encoder and self.model.mode != "lora":
            raise ValueError(
                f"`train_text_encoder` learns a LoRA, and mode {self.model.mode} has none; choose mode lora."
            )
        if self.output.validation_interventions and self.output.validation_prompt is None:
            raise ValueError(
                "`validation_interventions` are drawn with a prompt; give a `validation_prompt`, or leave them out."
            )

    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments of a pipeline's `from_pretrained`."""
        return {
            "context_adapter": False,  # a new one is learned
            "revision": self.model.revision,
            "variant": self.model.variant,
            "cache_dir": self.data.cache_dir,
        }

    def graph_edges(self) -> list[tuple[str, str]] | None:
        """The given graph as pairs (cause, effect).

        Raises:
            ValueError: if an edge is not written `cause->effect`.
        """
        if self.context.graph is None:
            return None
        edges = [tuple(part.strip() for part in edge.split("->")) for edge in self.context.graph]
        if any(len(edge) != 2 or not all(edge) for edge in edges):
            raise ValueError(f"Write each edge of `graph` as cause->effect, not {self.context.graph}.")
        return edges  # type: ignore[return-value]


GROUPS = (ModelConfig, DataConfig, ContextConfig, OptimizationConfig, OutputConfig)
