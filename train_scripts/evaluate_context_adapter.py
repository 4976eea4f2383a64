"""Measures a context adapter on held-out images: the laws of its contexts, compositions and counterfactuals.

    accelerate launch train_scripts/evaluate_context_adapter.py weather-context held-out --output_dir results

`held-out` has a sub-folder of images per context as in training, and may have compositions, such as `night+snow`.
Half of each context's images are compared with as many samples, the other half tells how far apart real images are.
Samples are written as they are made: the same command, given again, goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import diffusers_ctx
from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.adapter.weights import public_name
from diffusers_ctx.adapter_format import adapter_files, read_adapter_config
from diffusers_ctx.data import load_context_dataset
from diffusers_ctx.data.held_out import split_held_out
from diffusers_ctx.embedded import EMBEDDED_BASE
from diffusers_ctx.evaluation.features import autoencode, clip_features, latent_features
from diffusers_ctx.evaluation.grids import draw_grid
from diffusers_ctx.evaluation.image_store import ImageJob, check_settings, make_images, write_settings
from diffusers_ctx.evaluation.report import (
    draw_strengths,
    measure_context,
    measure_counterfactuals,
    render_markdown,
    summarize,
)
from diffusers_ctx.hub import pipeline_name, resolve_adapter_folder
from diffusers_ctx.pipelines import CompositionMixin, training_resolution
from diffusers_ctx.training.run.files import check_writable


ROUNDS = 10  # of counterfactuals without an intervention
COLUMNS = 8  # of the pictures
LIBRARIES = ("diffusers-ctx", "torch", "diffusers", "transformers", "accelerate", "peft", "POT")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationConfig:
    output_dir: str = _option("results", "Folder for the results, the pictures and the samples.")
    pretrained_model_name_or_path: str | None = _option(
        None, "Folder or Hub id of the base model; by default the one that the adapter names."
    )
    revision: str | None = _option(None, "Branch, tag or commit of the base model on the Hub.")
    variant: str | None = _option(None, "Variant of the base model's files, such as fp16.")
    posterior_encoder_model: str | None = _option(
        None,
        "Folder or Hub id of the CLIP model that the adapter's posterior sees, if any; by default as it names it.",
    )
    caption_column: str = _option("text", "The column of captions in metadata files; captions are the prompts.")
    skip_unreadable: bool = _option(False, "Leave out images that cannot be read, instead of stopping.")
    max_samples: int | None = _option(None, "At most this many samples per context; by default half its images.")
    num_counterfactuals: int = _option(32, "Observational images that counterfactuals are made of; 0 leaves them out.")
    num_inference_steps: int = _option(50, "Denoising steps.")
    guidance_scale: float = _option(1.0, "Classifier-free guidance of the samples; 1 samples the model's own law.")
    batch_size: int = _option(16, "Images made at once by each process.")
    feature_extractor: str | None = _option(
        None, "Folder or Hub id of a CLIP model for the kernel distance; by default the latents of the base's VAE."
    )
    seed: int = _option(0, "Seed of everything random.")
    cache_dir: str | None = _option(None, "Where downloads are kept.")

    def __post_init__(self):
        smallest = {"max_samples": 2, "num_counterfactuals": 0, "num_inference_steps": 1, "batch_size": 1}
        for name, least in smallest.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be {least} or more.")


class Evaluation:
    """All processes make images; the main one measures them and writes what it found.

    Args:
        config: what to do.
        adapter: folder or Hub id of the adapter.
        data: folder of held-out images.

    Raises:
        ValueError: if adapter, data and what is in the output folder do not go together. Nothing was made then.
    """

    def __init__(self, config: EvaluationConfig, adapter: str, data: str):
        require_libraries()
        self.config, self.adapter, self.data = config, adapter, data
        self.accelerator = Accelerator()
        self.output_dir = Path(config.output_dir)
        folder = resolve_adapter_folder(adapter, cache_dir=config.cache_dir)
        self.commit = folder.name if folder.parent.name == "snapshots" else None
        adapter_config = read_adapter_config(folder)
        self.obs_context = adapter_config["obs_context"]
        self.base = config.pretrained_model_name_or_path or recorded_base(adapter, adapter_config)
        self.dataset = load_context_dataset(
            data,
            obs_context=self.obs_context,
            text_column=config.caption_column,
            skip_unreadable=config.skip_unreadable,
        )
        self.contexts = split_held_out(
            self.dataset["context"], adapter_config["concepts"], self.obs_context, config.max_samples, config.seed
        )
        self.captions = list(self.dataset["text"])
        # samples take the place of the second half, which gives the floor
        self.prompts = {name: [self.captions[row] for row in x.again] for name, x in self.contexts.items()}
        self.pipeline = self._load_pipeline(getattr(diffusers_ctx, pipeline_name(adapter_config)))
        self.resolution = training_resolution(self.pipeline)
        self.observational = self.contexts[self.obs_context].real[: config.num_counterfactuals]
        self.settings = self._settings([folder / name for name in adapter_files(adapter_config)])
        check_settings(self.output_dir, self.settings)
        check_writable(self.output_dir)

    def run(self) -> None:
        self.accelerator.wait_for_everyone()  # until all have checked
        if self.accelerator.is_main_process:
            if not any(self.captions):
                print("The images have no captions: all samples are made with the empty prompt.", flush=True)
            write_settings(self.output_dir, self.settings)
        samples = self._make_samples()
        counterfactuals = self._make_counterfactuals() if self.observational else {}
        if self.accelerator.is_main_process:
            self._report(samples, counterfactuals)
        self.accelerator.end_training()

    def _load_pipeline(self, kind: type[CompositionMixin]) -> CompositionMixin:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)
        checker = {"safety_checker": None, "requires_safety_checker": False} if kind is ComposablePipeline else {}
        pipeline = kind.from_pretrained(
            self.base,
            revision=self.config.revision,
            variant=self.config.variant,
            cache_dir=self.config.cache_dir,
            **checker,
        )
        # a name does not tell whether what is behind it was trained on or replaced
        self.base_digest = digest(weight.numpy().tobytes() for weight in weights_of(pipeline))
        pipeline.load_context_adapter(self.adapter, cache_dir=self.config.cache_dir)
        clip, encoder = self.config.posterior_encoder_model, pipeline.context_module.config.posterior_encoder
        if clip is not None and encoder != "clip":
            raise ValueError(
                f"The adapter's posterior sees images through {encoder} and not CLIP; leave out"
                " `posterior_encoder_model`."
            )
        has_own = getattr(pipeline, "image_encoder", None) is not None
        if encoder == "clip" and self.config.num_counterfactuals and (clip is not None or not has_own):
            pipeline.load_posterior_encoder(clip, cache_dir=self.config.cache_dir)
        pipeline.set_progress_bar_config(disable=True)
        if any(model.dtype != dtype for model in models_of(pipeline)):  # any cast makes diffusers warn of it
            pipeline.to(dtype)
        return pipeline.to(self.accelerator.device)

    def _settings(self, adapter_files: list[Path]) -> dict[str, Any]:
        """All that the images depend on."""
        options = ["revision", "variant", "max_samples", "num_counterfactuals"]
        options += ["num_inference_steps", "guidance_scale", "seed"]
        return {
            "adapter": digest(file.read_bytes() for file in adapter_files),
            "pretrained_model_name_or_path": public_name(self.base),
            "base model": self.base_digest,
            **{name: getattr(self.config, name) for name in options},
            "mixed_precision": self.accelerator.mixed_precision,
            "posterior_encoder_model": public_name(self.config.posterior_encoder_model),
            "resolution": self.resolution,
            "counterfactuals of images": digest(map(np.ndarray.tobytes, self._real(self.observational))),
            "counterfactuals of captions": digest(self.captions[row].encode() for row in self.observational),
            **{f"captions of {name}": digest(map(str.encode, x)) for name, x in self.prompts.items()},
        }

    # Making images

    def _make_samples(self) -> dict[str, ImageJob]:
        def job(name: str) -> ImageJob:
            def produce(indices: list[int]) -> np.ndarray:
                prompts = [self.prompts[name][index] for index in indices]
                return self._sample(prompts, name, [f"{name}/{index}" for index in indices])

            return ImageJob(self.output_dir / "samples" / name, len(self.prompts[name]), produce)

        jobs = {name: job(name) for name in self.contexts}
        make_images(list(jobs.values()), self.config.batch_size, self.accelerator, "Samples")
        return jobs

    def _make_counterfactuals(self) -> dict[str, np.ndarray]:
        """Counterfactuals of observational images: unchanged again and again, and under each concept and back."""
        real = self._real(self.observational)
        prompts = [self.captions[row] for row in self.observational]
        made: dict[str, np.ndarray] = {}

        def make(name: str, produce: Callable[[list[int]], np.ndarray]) -> np.ndarray:
            job = ImageJob(self.output_dir / "counterfactuals" / name, len(real), produce)
            make_images([job], self.config.batch_size, self.accelerator, f"Counterfactuals, {name}")
            made[name] = job.images()
            return made[name]

        def predict(images: np.ndarray, interventions: list[str], factual: list[str]):
            return lambda indices: to_uint8(
                self.pipeline.counterfactual(
                    images[indices] / 255,
                    interventions,
                    factual,
                    prompt=[prompts[index] for index in indices],
                    num_inference_steps=self.config.num_inference_steps,
                    output_type="np",
                ).images
            )

        make("unchanged-0", lambda indices: autoencode(self.pipeline.vae, real[indices]))
        images = real
        for number in range(1, ROUNDS + 1):
            images = make(f"unchanged-{number}", predict(images, [], []))
        for concept in self.pipeline.concepts:
            there = make(f"do-{concept}", predict(real, [concept], []))
            make(f"undo-{concept}", predict(there, [], [concept]))
        return made

    def _sample(self, prompts: list[str], context: str, keys: Sequence[str]) -> np.ndarray:
        """One image (H, W, 3) uint8 for each prompt, from the noise of its key."""
        output = self.pipeline(
            prompts,
            interventions=list(self.contexts[context].interventions),
            generator=[keyed_generator(f"{self.config.seed}/{key}") for key in keys],
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            output_type="np",
        )
        return to_uint8(output.images)

    def _real(self, rows: Sequence[int]) -> np.ndarray:
        """Images (n, H, W, 3) uint8, resized and cropped in the centre."""
        size = (self.resolution, self.resolution)
        squares = [ImageOps.fit(self.dataset[row]["image"], size, Image.Resampling.LANCZOS) for row in rows]
        return np.array([np.asarray(square) for square in squares])

    # Measuring them

    def _report(self, samples: dict[str, ImageJob], counterfactuals: dict[str, np.ndarray]) -> None:
        config, vae = self.config, self.pipeline.vae
        features = latent_features(vae, config.batch_size)
        if config.feature_extractor:
            features = clip_features(config.feature_extractor, vae.device, config.batch_size, config.cache_dir)
        figures = {}
        for name, context in tqdm(self.contexts.items(), desc="Measuring"):
            real, again = self._real(context.real), self._real(context.again)
            figures[name] = measure_context(samples[name].images(), real, again, features, config.seed)
        module = self.pipeline.context_module
        strengths = module.causal.strengths().float().cpu().numpy()
        results = {
            "adapter": self.adapter,
            "adapter_commit": self.commit,
            "data": self.data,
            "contexts": figures,
            **summarize(figures, {name: context.interventions for name, context in self.contexts.items()}),
            "graph": {"nodes": module.node_names, "strengths": strengths.tolist()},
            "settings": self.settings,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "batch_size": config.batch_size,
            "feature_extractor": config.feature_extractor,
            "num_processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        if counterfactuals:
            rounds = {number: counterfactuals[f"unchanged-{number}"] for number in (0, 1, ROUNDS)}
            names = self.pipeline.concepts
            undone = {name: (counterfactuals[f"do-{name}"], counterfactuals[f"undo-{name}"]) for name in names}
            real = self._real(self.observational)
            results["counterfactuals"] = measure_counterfactuals(real, rounds, undone)
            draw_counterfactuals(real, rounds, undone).save(self.output_dir / "counterfactuals.png")
        (self.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        text = f"{self.adapter} on {self.data}, {config.num_inference_steps} steps, seed {config.seed}\n\n"
        text += render_markdown(results)
        (self.output_dir / "results.md").write_text(text, encoding="utf-8")
        self._draw_contexts().save(self.output_dir / "grid.png")
        draw_strengths(strengths, module.node_names).savefig(self.output_dir / "graph.png")
        print(text)

    def _draw_contexts(self) -> Image.Image:
        """A row of samples per context, the same noise and prompt down a column, and real images beside it."""
        prompts = self.prompts[self.obs_context][:COLUMNS]
        gap = np.full((1, self.resolution, self.resolution, 3), 255, dtype=np.uint8)
        rows, labels = [], []
        for name, context in self.contexts.items():
            samples = self._sample(prompts, name, [f"column {c}" for c in range(len(prompts))])
            rows.append(np.concatenate([samples, gap, self._real(context.real[: len(prompts)])]))
            labels.append(f"{name}: samples, real held-out images")
        return draw_grid(rows, labels)


def draw_counterfactuals(
    images: np.ndarray, rounds: dict[int, np.ndarray], undone: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Image.Image:
    rows = {"observational images": images}
    rows |= {f"no intervention, round {number}": unchanged for number, unchanged in rounds.items() if number}
    for name, (there, back) in undone.items():
        rows |= {f"do({name})": there, f"do({name}), undone": back}
    return draw_grid([row[:COLUMNS] for row in rows.values()], list(rows))


def recorded_base(adapter: str, adapter_config: dict[str, Any]) -> str:
    """The base model that an adapter was trained on, where its config says enough to load it."""
    base = adapter_config["base_model_name_or_path"]
    if adapter_config["mode"] == "full":
        return adapter  # its own pipeline is in the same place
    if base == EMBEDDED_BASE:
        return embedded_base()
    if not base or "/" not in base:
        raise ValueError(
            f"The adapter names its base model only as {base!r}; give the folder or Hub id as"
            " `--pretrained_model_name_or_path`."
        )
    return base


def keyed_generator(key: str) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    return torch.Generator().manual_seed(int(digest([key.encode()]), base=16) % 2**63)


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def models_of(pipeline: CompositionMixin) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def weights_of(pipeline: CompositionMixin) -> Iterable[torch.Tensor]:
    return (weight.float() for model in models_of(pipeline) for weight in model.state_dict().values())


def to_uint8(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


def require_libraries() -> None:
    """Before hours of sampling, and not after."""
    packages = {"ot": "POT", "matplotlib": "matplotlib"}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The evaluation needs {missing}; run `pip install {' '.join(missing)}`.")


def main() -> None:
    parser = HfArgumentParser(EvaluationConfig, description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="Folder or Hub id of the context adapter.")
    parser.add_argument("data", help="Folder with one sub-folder of held-out images per context.")
    config, arguments = parser.parse_args_into_dataclasses()
    Evaluation(config, arguments.adapter, arguments.data).run()


if __name__ == "__main__":
    main()
