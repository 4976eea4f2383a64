"""What a training run is told. Fields are the command line's flags, named as in diffusers' own scripts."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml


def _option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    pretrained_model_name_or_path: str = field(metadata={"help": "Local folder or Hub id of a Stable Diffusion."})
    revision: str | None = _option(None, "Branch, tag or commit of the model on the Hub.")
    variant: str | None = _option(None, "Variant of the model files, such as fp16.")
    mode: str = _option("lora", "What learns: `frozen` the adapter alone, `lora` a LoRA too, `full` the UNet too.")
    rank: int = _option(16, "Rank of the LoRA.")
    train_text_encoder: bool = _option(False, "In mode lora, learn a LoRA of the text encoders too.")
    injection: str = _option(
        "cross_attention",
        "How the UNet sees the tokens: by attention of its own (`cross_attention`), or as a part of the `prompt`.",
    )
    unfreeze_after: float | None = _option(
        None,
        "In modes lora and full, the share of training before the UNet learns too. By default 0.2, but 0 where it has"
        " to learn another noise schedule.",
    )
    enable_xformers_memory_efficient_attention: bool = _option(False, "Use xformers' attention (CUDA only).")
    prediction_type: str | None = _option(
        None,
        "What the UNet learns to predict, where the base predicts another: `epsilon`, `v_prediction` or `sample`.",
    )
    rescale_betas_zero_snr: bool = _option(False, "Learn with zero terminal SNR, and end the noise in pure noise.")
    gradient_checkpointing: bool = _option(False, "Save memory by computing activations twice.")


@dataclass
class DataConfig:
    train_data_dir: str | None = _option(None, "Folder with one sub-folder of images per context.")
    dataset_name: str | None = _option(None, "Dataset on the Hub or on disk, in the place of a folder.")
    dataset_config_name: str | None = _option(None, "The dataset's configuration, where it has several.")
    dataset_split: str = _option("train", "The dataset's split.")
    image_column: str = _option("image", "The dataset's column of images.")
    context_column: str = _option("context", "The dataset's column of context names.")
    caption_column: str = _option("text", "The column of captions, in datasets and in metadata files.")
    obs_context: str = _option("obs", "Name of the observational context.")
    concepts: list[str] | None = field(
        default=None, metadata={"help": "Concepts to learn, in order; by default every context but the observational."}
    )
    max_train_samples: int | None = _option(None, "Use at most this many images of each context.")
    validation_images: int = _option(0, "Hold out so many images of each context and log the loss on them.")
    skip_unreadable: bool = _option(False, "Leave out images that cannot be read, instead of stopping.")
    resolution: int | None = _option(
        None, "Height and width to resize and crop images to; by default the model's own."
    )
    center_crop: bool = _option(False, "Crop the centre, and not the same random place for each image.")
    random_flip: bool = _option(False, "Flip images left to right at random.")
    proportion_empty_prompts: float = _option(0.1, "Share of captions dropped, for classifier-free guidance.")
    cache_latents: bool = _option(
        False, "Keep encoded images, and captions unless text encoders learn, on disk; encode each once."
    )
    dataloader_num_workers: int = _option(
        0, "Processes that read images to be encoded before training; with none, the one that encodes does."
    )
    streaming: bool = _option(False, "Read images as they are needed, for collections that do not fit on the disk.")
    streaming_concept_images: int = _option(
        1000, "With streaming, the images of each context that are taken first, to learn the concepts on."
    )
    streaming_shuffle_buffer: int = _option(
        256, "With streaming, the images of each context that are shuffled among one another."
    )
    cache_dir: str | None = _option(None, "Where downloads and what was encoded are kept; by default that of the Hub.")


@dataclass
class ContextConfig:
    causal_form: str = _option("structural", "`structural` or `reduced_form`.")
    graph: list[str] | None = field(
        default=None, metadata={"help": "Edges `cause->effect` of a known graph; by default the graph is learned."}
    )
    num_hidden_factors: int = _option(4, "Factors that no context intervenes on.")
    noise_dim: int = _option(1, "Width of each concept's exogenous noise.")
    tokens_per_concept: int = _option(1, "Tokens that each concept gives to the UNet.")
    posterior_type: str = _option("inverse", "`inverse` (inverts the mechanisms) or `amortized`.")
    posterior_encoder: str | None = _option(
        None,
        "What the posterior sees of images: latents (`vae`), or features of the `unet` or of a `clip` image encoder."
        " By default `unet`, or `clip` if its model is named; `vae` where the UNet has no features to give: in mode"
        " `full`, with streaming, and without a middle block.",
    )
    posterior_encoder_model: str | None = _option(
        None, "Local folder or Hub id of the CLIP model; by default the image encoder of the pipeline, if it has one."
    )
    expressive_depth: int = _option(0, "Layers between mechanism and causal layer; needs an amortized posterior.")
    kl_weight: float = _option(1.0, "Weight β of the KL divergence, in units of the likelihood.")
    kl_warmup_steps: int = _option(100, "Steps over which β grows from zero.")
    contrastive_weight: float = _option(30.0, "Weight of the contrast between contexts.")
    matching_weight: float = _option(50.0, "Weight of the match of the noise in each context to its prior.")
    generation_weight: float = _option(500.0, "Weight of the match of decoded prior noise in each context to images.")
    acyclicity_weight: float = _option(10.0, "Weight of the penalty on cycles of a learned graph.")
    sparsity_weight: float = _option(
        0.0, "Weight of the group lasso on the edges of the causal layer; fits of a learned graph add 0.03 to it."
    )
    concept_steps: int = _option(1500, "Steps in which concepts are learned with a light decoder, before the UNet.")
    concept_batch_size: int = _option(336, "Images per such step, all contexts together.")
    concept_learning_rate: float = _option(
        3e-3, "Peak learning rate of these steps; mechanisms and graph learn ten times as fast in the end."
    )


@dataclass
class OptimizationConfig:
    seed: int = _option(0, "Seed of everything random, but for what is held out.")
    train_batch_size: int = _option(16, "Images per step and process.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimizer step.")
    num_train_epochs: int = _option(100, "Epochs, unless max_train_steps is given.")
    max_train_steps: int | None = _option(None, "Optimizer steps.")
    learning_rate: float = _option(1e-4, "Peak learning rate.")
    scale_lr: bool = _option(False, "Multiply the learning rate by processes, accumulation and batch size.")
    lr_scheduler: str = _option("constant", "A learning-rate schedule of diffusers.")
    lr_warmup_steps: int | None = _option(
        None, "Warm-up steps of the schedule, by default 500; the schedule `constant` has none."
    )
    snr_gamma: float | None = _option(None, "γ of min-SNR weighting; 5.0 is usual.")
    timestep_sampling: str = _option("uniform", "How timesteps are drawn: `uniform`, `logit_normal` or `high_noise`.")
    noise_offset: float = _option(0.0, "Scale of an offset per image and channel that is added to the noise.")
    optimizer: str = _option("adamw", "`adamw`, `adamw_8bit` (bitsandbytes) or `prodigy` (prodigyopt).")
    adam_beta1: float = _option(0.9, "β1 of the optimizer.")
    adam_beta2: float = _option(0.999, "β2 of the optimizer.")
    adam_weight_decay: float = _option(1e-2, "Weight decay of the optimizer.")
    adam_epsilon: float = _option(1e-8, "ε of the optimizer.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; `inf` leaves them as they are.")
    use_ema: bool = _option(False, "Save a moving average of the weights that learn, and validate with it.")
    ema_decay: float = _option(0.9999, "Decay of the average after its warm-up.")
    mixed_precision: str | None = _option(None, "`no`, `fp16` or `bf16`; by default what Accelerate is set to.")
    allow_tf32: bool = _option(False, "Allow TF32 on Ampere GPUs.")


@dataclass
class OutputConfig:
    output_dir: str = _option("context-adapter", "Folder for the adapter, its checkpoints and logs.")
    logging_dir: str = _option("logs", "Folder within output_dir for the trackers.")
    report_to: str = _option("tensorboard", "Tracker to report to, `all` or `none`.")
    checkpointing_steps: int = _option(
        500, "Steps between checkpoints; there is one before the first step, and one after the last, in any case."
    )
    checkpoints_total_limit: int | None = _option(None, "Keep at most this many checkpoints.")
    resume_from_checkpoint: str | None = _option(None, "A checkpoint's folder, or `latest`.")
    validation_prompt: str | None = _option(None, "Prompt of the validation images; none, no validation.")
    validation_interventions: list[str] | None = field(
        default=None, metadata={"help": "Compositions to validate beside the single contexts, such as `night+snow`."}
    )
    validation_steps: int = _option(500, "Steps between validations.")
    num_validation_images: int = _option(4, "Images per context in a validation.")
    validation_guidance_scale: float = _option(7.5, "Classifier-free guidance of the validation images.")
    push_to_hub: bool = _option(False, "Push the adapter to the Hub when it is done.")
    hub_token: str | None = _option(None, "Token with write access; by default that of `hf auth login`.")
    hub_model_id: str | None = _option(None, "Repository to push to; by default the name of output_dir.")


_GROUPS = (ModelConfig, DataConfig, ContextConfig, OptimizationConfig, OutputConfig)


@dataclass
class TrainingConfig:
    """All of the above."""

    model: ModelConfig
    data: DataConfig
    context: ContextConfig = field(default_factory=ContextConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        if (self.data.train_data_dir is None) == (self.data.dataset_name is None):
            raise ValueError("Give either `train_data_dir` or `dataset_name`.")
        if self.model.mode not in ("frozen", "lora", "full"):
            raise ValueError(f"Unknown mode '{self.model.mode}'; choose frozen, lora or full.")
        if self.model.train_text_encoder and self.model.mode != "lora":
            raise ValueError(
                f"`train_text_encoder` learns a LoRA, and mode {self.model.mode} has none; choose mode lora."
            )
        if self.model.unfreeze_after is not None and not 0 <= self.model.unfreeze_after < 1:
            raise ValueError(f"`unfreeze_after` is {self.model.unfreeze_after}; it is a share in [0, 1).")

    def loading_options(self) -> dict[str, Any]:
        """Arguments of a pipeline's `from_pretrained`, beside the name."""
        return {
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


def parse_training_config(arguments: list[str] | None = None) -> TrainingConfig:
    """Reads the command line. Options may stand in a `.json` or `.yaml` file, which goes first; flags after it
    override what it says.

    Raises:
        ValueError: if the file is not of options, or they are not of their types.
        OSError: if it cannot be read.
    """
    import sys

    from transformers import HfArgumentParser

    parser = HfArgumentParser(_GROUPS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-") or not arguments[0].endswith((".json", ".yaml", ".yml")):
        return TrainingConfig(*parser.parse_args_into_dataclasses(arguments))
    file, *flags = arguments
    parser.set_defaults(**_read_options(Path(file)))
    for action in parser._actions:  # what the file says need not be a flag
        action.required = False
    model, *others = parser.parse_args_into_dataclasses(flags)
    if model.pretrained_model_name_or_path is None:
        raise ValueError(f"{file} names no `pretrained_model_name_or_path`; add it, or give it as a flag.")
    return TrainingConfig(model, *others)


def _read_options(file: Path) -> dict[str, Any]:
    """Options from a file, each of its type.

    Raises:
        ValueError: if the file holds no options, or ones that do not exist or are not of their types.
    """
    try:
        options = (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options; write each as `name: value`, such as `train_data_dir: photos`.")
    kinds = {name: kind for group in _GROUPS for name, kind in get_type_hints(group).items()}
    for name in options:
        if name not in kinds:
            near = get_close_matches(str(name), kinds, n=1)
            mend = f"did you mean `{near[0]}`?" if near else "`--help` lists all."
            raise ValueError(f"{file}: there is no option `{name}`; {mend}")
    try:
        return {name: _as_annotated(name, value, kinds[name]) for name, value in options.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _as_annotated(name: str, value: Any, annotation: Any) -> Any:
    """An option from a file, which may hold values of any type.

    Raises:
        ValueError: if it is not of its option's type.
    """
    kind = next(kind for kind in _KINDS if annotation in (kind, kind | None))
    return None if value is None and annotation != kind else _as_kind(name, value, kind)


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text, in quotes if it looks like something else",
    list[str]: "a list of texts",
}


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    if name == "mixed_precision" and value is False:  # what YAML takes `no` for
        return "no"
    if kind == list[str]:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    elif kind in (int, float) and isinstance(value, str):  # what YAML takes `1e-4`, without a dot, for
        with suppress(ValueError):
            return kind(value)
    raise ValueError(f"`{name}` is {value!r}; give {_KINDS[kind]}.")
