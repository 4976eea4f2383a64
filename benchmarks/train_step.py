"""Time and memory of an optimizer step of context adapters, relative to a plain LoRA.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --train_batch_size 4 --rank 8 --steps 200
    python benchmarks/train_step.py --only frozen  # its peak memory alone
    python benchmarks/train_step.py --mixed_precision bf16  # on a GPU; or --allow_tf32

Cases take turns step by step: a machine that slows down slows down all of them. Each one's memory is measured first,
in a process of its own. Images of quad are resized to the base's resolution.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import torch
import transformers
from methods.setting import device
from methods.steps import AdapterRun, PlainLora, StepCase, StepSetting, create_run

from diffusers_ctx import embedded_base
from diffusers_ctx.paths import expand_home, local_path


RESULTS = Path(__file__).parent / "results" / "train_step.json"
REFERENCE = "plain-lora"
_WARMUP_ROUNDS = 5
_MEMORY_STEPS = 3  # the optimizer's state is there from the first one on
_RESAMPLES = 2000
CASES = {
    REFERENCE: StepCase(None),
    "frozen": StepCase("frozen"),
    "lora": StepCase("lora"),
    "lora-first-share": StepCase("lora", first_share=True),
    "full": StepCase("full"),
    "full-first-share": StepCase("full", first_share=True),
    "plain-lora-encoding": StepCase(None, cached=False),
    "lora-encoding": StepCase("lora", cached=False),
}


# time


def alternate(steps: dict[str, Callable[[], None]], rounds: int, warmup_rounds: int) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each step. Every round takes each step once, in a new random order."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup_rounds + rounds):
        for name in rng.permutation(list(steps)):
            start = time.perf_counter()
            steps[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[warmup_rounds:]) for name, values in seconds.items()}


def ratio_of_medians(seconds: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """The ratio of the medians of two cases, and its 95 % bootstrap interval over the rounds they share."""
    rounds = np.random.default_rng(0).integers(0, len(seconds), (_RESAMPLES, len(seconds)))
    resampled = np.median(seconds[rounds], axis=1) / np.median(reference[rounds], axis=1)
    return {
        "ratio": float(np.median(seconds) / np.median(reference)),
        "interval": np.quantile(resampled, (0.025, 0.975)).tolist(),
    }


# memory


def peak_memory(run: AdapterRun | PlainLora) -> float:
    """Peak memory of some steps, in MiB: allocated on the GPU with CUDA, and otherwise resident since the process
    began, with Python and its libraries."""
    on_cuda = run.accelerator.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(_MEMORY_STEPS):
        run.step()
    return torch.cuda.max_memory_allocated() / 2**20 if on_cuda else peak_resident()


def peak_resident() -> float:
    """MiB that this process had in memory at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory_alone(name: str, args: argparse.Namespace) -> float:
    """`peak_memory` of a case in a process of its own.

    On Linux a process starts with the peak of the one that started it: call this before models are loaded.
    """
    options = ("pretrained_model_name_or_path", "train_batch_size", "rank", "mixed_precision")
    flags = [part for option in options for part in (f"--{option}", str(getattr(args, option)))]
    flags += ["--allow_tf32"] * args.allow_tf32
    command = [sys.executable, __file__, "--only", name, *flags]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


# all of it


def measure(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Times and memory of all cases."""
    imported = peak_resident()
    memory = {name: peak_memory_alone(name, args) for name in CASES}
    setting = create_setting(args, work_dir)
    runs = {name: create_run(setting, case) for name, case in CASES.items()}
    seconds = alternate({name: run.step for name, run in runs.items()}, args.steps, _WARMUP_ROUNDS)
    cases = {
        name: {
            "optimizer_parameters": sum(p.numel() for p in run.learning),
            "median_seconds": float(np.median(seconds[name])),
            "quartiles_seconds": np.quantile(seconds[name], (0.25, 0.75)).tolist(),
            "to_plain_lora": ratio_of_medians(seconds[name], seconds[REFERENCE]),
            "peak_mib": memory[name],
        }
        for name, run in runs.items()
    }
    caching = {
        name: ratio_of_medians(seconds[f"{name}-encoding"], seconds[name])
        for name in CASES
        if f"{name}-encoding" in CASES
    }
    return {"cases": cases, "encoding_to_cached": caching, "imported_mib": imported}


def create_setting(args: argparse.Namespace, work_dir: Path) -> StepSetting:
    base, precision = args.pretrained_model_name_or_path, args.mixed_precision
    return StepSetting(base, args.train_batch_size, args.rank, work_dir, precision, args.allow_tf32)


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Record of the measurement: command, machine and versions."""
    from provenance import commit, machine  # not above: its imports would count as the cases' memory

    base = Path(args.pretrained_model_name_or_path)
    libraries = (torch, diffusers, transformers, accelerate, peft)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "device": device().type,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of other programs too, over the last minute; ours is up to `threads`
        "versions": {library.__name__: library.__version__ for library in libraries},
        "options": {
            "base": base.name if base.is_dir() else str(base),
            "train_batch_size": args.train_batch_size,
            "rank": args.rank,
            "mixed_precision": args.mixed_precision,
            "allow_tf32": args.allow_tf32,
            "steps": args.steps,
        },
    }


def render_table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| | parameters in the optimizer | step, ms | quartiles | of plain LoRA | 95 % interval | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["cases"].items():
        lower, upper = (1000 * quartile for quartile in row["quartiles_seconds"])
        ratio, (low, high) = row["to_plain_lora"]["ratio"], row["to_plain_lora"]["interval"]
        lines.append(
            f"| {name} | {row['optimizer_parameters']:,} | {1000 * row['median_seconds']:.1f} | {lower:.1f} to"
            f" {upper:.1f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {row['peak_mib']:,.0f} |"
        )
    lines.append("")
    for name, row in results["encoding_to_cached"].items():
        low, high = row["interval"]
        lines.append(f"With cached latents {name} is {row['ratio']:.2f} times as fast ({low:.2f} to {high:.2f}).")
    if results["device"] == "cpu":
        lines.append(f"Of each peak, {results['imported_mib']:,.0f} MiB are Python and its libraries.")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", type=expand_home, default=embedded_base())
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--allow_tf32", action="store_true", help="Let a GPU multiply in TF32.")
    parser.add_argument("--steps", type=int, default=100, help="Steps of each case, after a few to warm up.")
    parser.add_argument("--results", type=local_path, default=RESULTS, help="File of the results.")
    parser.add_argument("--only", choices=list(CASES), help="Print the peak memory of this one alone, in MiB.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        if args.only is not None:
            setting = create_setting(args, Path(folder))
            print(peak_memory(create_run(setting, CASES[args.only])))
            return
        results = measure(args, Path(folder))
    results = circumstances(args) | results
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(render_table(results))


if __name__ == "__main__":
    main()
