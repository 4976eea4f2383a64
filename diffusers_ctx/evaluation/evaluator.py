"""Measures a context adapter on held-out images: its contexts, compositions and counterfactuals."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..data import load_context_dataset
from ..fingerprint import fingerprint
from ..keyed_random import keyed_generator
from ..paths import local_path
from ..pipelines import describe_truncated, truncation_unsaid
from ..plot import draw_grid, edge_strengths
from .config import EvaluationConfig
from .features import autoencode, clip_features, latent_features
from .held_out_images import HeldOutImages
from .image_store import ImageJob, check_settings, make_images, write_settings
from .images import to_uint8
from .report import (
    Metrics,
    measure_context,
    measure_counterfactuals,
    render_markdown,
    summarize,
)


ROUNDS = 10  # of counterfactuals without an intervention
COLUMNS = 8  # of the pictures
LIBRARIES = ("diffusers-ctx", "torch", "diffusers", "transformers", "accelerate", "peft", "POT", "scikit-learn")


class Evaluator:
    """Measures a pipeline with a context adapter; all processes make images, and the main one measures them.

    Half of each context's held-out images are compared with as many samples. The other half gives the real-vs-real
    baseline, and the samples' prompts.

    Args:
        config: options; those of loading the pipeline have no influence here.
        pipeline: a pipeline with a context adapter, on the device of this process.
        data: folder with a sub-folder of held-out images per context.
        source: names of what was loaded, such as `adapter`, for the record.
        fingerprints: of the weights that were loaded. Images in the output folder that were made with other weights
            are refused.
        accelerator: the processes; by default those that `accelerate launch` started.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        pipeline: Any,
        data: str,
        source: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        accelerator: Accelerator | None = None,
    ):
        self.config, self.pipeline, self.data = config, pipeline, data
        self.source, self.fingerprints = source, fingerprints
        self.accelerator = accelerator or Accelerator()
        self.output_dir = Path(config.output_dir)

    def run(self) -> dict[str, Any] | None:
        """Makes the images that are not in the output folder yet, measures all of them and writes the report.

        Returns:
            the results as in `results.json`, in the main process alone.

        Raises:
            ImportError: if a library of the metrics is not installed.
            ValueError: if adapter, data and the content of the output folder do not fit together. No image is made
                then.
        """
        _require_libraries()
        held_out = self._load_images()
        self._load_posterior_encoder()
        settings = self._settings(held_out)
        check_settings(self.output_dir, settings)
        self.accelerator.wait_for_everyone()  # until all have checked
        if self.accelerator.is_main_process:
            if not any(held_out.captions):
                print("The images have no captions: all samples are made with the empty prompt.", flush=True)
            write_settings(self.output_dir, settings)
            if line := describe_truncated(self.pipeline, held_out.captions):
                print(line, flush=True)
        results = None
        with truncation_unsaid(self.pipeline):
            samples = self._make_samples(held_out)
            counterfactuals = self._make_counterfactuals(held_out)
            if self.accelerator.is_main_process:
                results = self._measure(held_out, samples, counterfactuals) | self._record(settings)
                self._write(results)
                self._draw(held_out, counterfactuals, results["graph"])
        self.accelerator.end_training()
        return results

    # Before any image is made

    def _load_images(self) -> HeldOutImages:
        config, module = self.config, self.pipeline.context_module.config
        dataset = load_context_dataset(
            local_path(self.data),
            obs_context=module.obs_context,
            text_column=config.caption_column,
            skip_unreadable=config.skip_unreadable,
            output_dir=self.output_dir,
        )
        return HeldOutImages(
            dataset,
            module.concepts,
            module.obs_context,
            module.posterior_sample_size * self.pipeline.vae_scale_factor,
            config.max_samples,
            config.seed,
        )

    def _load_posterior_encoder(self) -> None:
        """Loads the CLIP model that counterfactuals need, before hours of sampling and not after."""
        name, encoder = self.config.posterior_encoder_model, self.pipeline.context_module.config.posterior_encoder
        if name is not None and encoder != "clip":
            raise ValueError(
                f"The adapter's posterior reads images through {encoder} and not CLIP; leave out"
                " `posterior_encoder_model`."
            )
        is_component = getattr(self.pipeline, "image_encoder", None) is not None
        if encoder == "clip" and self.config.num_counterfactuals and (name is not None or not is_component):
            self.pipeline.load_posterior_encoder(name, cache_dir=self.config.cache_dir)

    def _settings(self, held_out: HeldOutImages) -> dict[str, Any]:
        """All that the images depend on."""
        names = ("max_samples", "num_counterfactuals", "num_inference_steps", "guidance_scale", "match_prompt", "seed")
        rows = self._counterfactual_rows(held_out)
        return {
            **self.fingerprints,
            **{name: getattr(self.config, name) for name in names},
            "posterior_encoder_model": self.config.posterior_encoder_model,
            "mixed_precision": self.accelerator.mixed_precision,
            "resolution": held_out.resolution,
            "counterfactuals of images": fingerprint(held_out.images(rows)) if rows else None,
            "counterfactuals of captions": fingerprint([held_out.captions[row] for row in rows]),
            **{f"captions of {name}": fingerprint(prompts) for name, prompts in held_out.prompts.items()},
        }

    def _counterfactual_rows(self, held_out: HeldOutImages) -> list[int]:
        return held_out.observational.real[: self.config.num_counterfactuals]

    # Making images

    def _make_samples(self, held_out: HeldOutImages) -> dict[str, ImageJob]:
        def job(name: str) -> ImageJob:
            prompts, interventions = held_out.prompts[name], held_out.contexts[name].interventions

            def produce(indices: list[int]) -> np.ndarray:
                return self._sample([prompts[index] for index in indices], interventions, name, indices)

            return ImageJob(self.output_dir / "samples" / name, len(prompts), produce)

        jobs = {name: job(name) for name in held_out.contexts}
        make_images(list(jobs.values()), self.config.batch_size, self.accelerator, "Samples")
        return jobs

    def _sample(
        self, prompts: list[str], interventions: Sequence[str], stream: str, indices: Sequence[int]
    ) -> np.ndarray:
        """An image (H, W, 3) uint8 for each prompt, from the noise of the stream at its index."""
        output = self.pipeline(
            prompts,
            interventions=list(interventions),
            generator=[keyed_generator(self.config.seed, "samples", stream, index) for index in indices],
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            match_prompt=self.config.match_prompt,
            output_type="np",
        )
        return to_uint8(output.images)

    def _make_counterfactuals(self, held_out: HeldOutImages) -> dict[str, np.ndarray]:
        """Counterfactuals of observational images: unchanged again and again, and under each concept and back."""
        rows = self._counterfactual_rows(held_out)
        if not rows:
            return {}
        real, prompts = held_out.images(rows), [held_out.captions[row] for row in rows]
        made: dict[str, np.ndarray] = {"real": real}

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

    # Measuring them

    def _measure(
        self, held_out: HeldOutImages, samples: dict[str, ImageJob], counterfactuals: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        config, vae, module = self.config, self.pipeline.vae, self.pipeline.context_module
        features = latent_features(vae, config.batch_size)
        if config.feature_extractor:
            features = clip_features(config.feature_extractor, vae.device, config.batch_size, config.cache_dir)
        metrics: dict[str, Metrics] = {}
        for name, context in tqdm(held_out.contexts.items(), desc="Measuring"):
            real, real_b = held_out.images(context.real), held_out.images(context.real_b)
            metrics[name] = measure_context(samples[name].images(), real, real_b, features, config.seed)
        strengths = module.causal.strengths().float().cpu().numpy()
        results: dict[str, Any] = {
            "contexts": metrics,
            **summarize(metrics, {name: context.interventions for name, context in held_out.contexts.items()}),
            "graph": {"nodes": module.node_names, "strengths": strengths.tolist()},
        }
        if counterfactuals:
            rounds, undone = self._rounds(counterfactuals), self._undone(counterfactuals)
            results["counterfactuals"] = measure_counterfactuals(counterfactuals["real"], rounds, undone)
        return results

    def _rounds(self, counterfactuals: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        return {number: counterfactuals[f"unchanged-{number}"] for number in (0, 1, ROUNDS)}

    def _undone(self, counterfactuals: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        names = self.pipeline.concepts
        return {name: (counterfactuals[f"do-{name}"], counterfactuals[f"undo-{name}"]) for name in names}

    def _record(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What the results were measured with."""
        return {
            **self.source,
            "data": self.data,
            "settings": settings,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "batch_size": self.config.batch_size,
            "feature_extractor": self.config.feature_extractor,
            "num_processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }

    def _write(self, results: dict[str, Any]) -> None:
        steps, seed = self.config.num_inference_steps, self.config.seed
        text = f"{results['adapter']} on {self.data}, {steps} steps, seed {seed}\n\n{render_markdown(results)}"
        (self.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (self.output_dir / "results.md").write_text(text, encoding="utf-8")
        print(text)

    # Pictures

    def _draw(self, held_out: HeldOutImages, counterfactuals: dict[str, np.ndarray], graph: dict[str, Any]) -> None:
        self._draw_contexts(held_out).save(self.output_dir / "grid.png")
        edge_strengths({"": np.array(graph["strengths"])}, graph["nodes"]).savefig(self.output_dir / "graph.png")
        if counterfactuals:
            rounds, undone = self._rounds(counterfactuals), self._undone(counterfactuals)
            picture = draw_counterfactuals(counterfactuals["real"], rounds, undone)
            picture.save(self.output_dir / "counterfactuals.png")

    def _draw_contexts(self, held_out: HeldOutImages) -> Image.Image:
        """A row of samples per context, with the same noise and prompt down a column, next to real images."""
        prompts = next(iter(held_out.prompts.values()))[:COLUMNS]  # of the observational context
        gap = np.full((1, held_out.resolution, held_out.resolution, 3), 255, dtype=np.uint8)
        rows, labels = [], []
        for name, context in held_out.contexts.items():
            samples = self._sample(prompts, context.interventions, "columns of the grid", range(len(prompts)))
            rows.append(np.concatenate([samples, gap, held_out.images(context.real[: len(prompts)])]))
            labels.append(f"{name}: samples, real held-out images")
        return draw_grid(rows, labels)


def draw_counterfactuals(
    images: np.ndarray, rounds: dict[int, np.ndarray], undone: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Image.Image:
    """Observational images, and below them their counterfactuals; arguments as in `measure_counterfactuals`."""
    rows = {"observational images": images}
    rows |= {f"no intervention, round {number}": unchanged for number, unchanged in rounds.items() if number}
    for name, (there, back) in undone.items():
        rows |= {f"do({name})": there, f"do({name}), undone": back}
    return draw_grid([row[:COLUMNS] for row in rows.values()], list(rows))


def _require_libraries() -> None:
    """Before hours of sampling, and not after."""
    packages = {"ot": "POT", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The evaluation needs {missing}; run `pip install {' '.join(missing)}`.")
