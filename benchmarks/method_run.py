"""One method's training and results, which are on disk as they are measured."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods.setting import Method, Sampler, Setting
from provenance import commit, machine
from training_logs import write_log


_OF_SAMPLING = ("n", "num_inference_steps", "guidance_scale")
_OF_SETTINGS = (
    *("seed", "images_per_context", "train_steps", "concept_steps", "baseline_steps", "num_inference_steps"),
    "work_dir",
)


class MethodRun:
    """Trains a method and keeps its results.

    Args:
        name: of the method.
        setting: what all methods share.
        options: what results depend on; those of sampling do not concern training.
        results_dir: folder of results.
        budget: name of the folder within a setting's.

    Raises:
        ValueError: if the file has metrics of other options.
    """

    def __init__(self, name: str, setting: Setting, options: dict[str, Any], results_dir: Path, budget: str):
        self.name, self.setting = name, setting
        guidance = "" if setting.guidance_scale == 1 else f"-guidance{setting.guidance_scale:g}"
        self.file = results_dir / f"{setting.name}-{budget}{guidance}" / f"{name}.json"
        self.folder = setting.work_dir / f"{setting.name}-{budget}" / name
        self.results: dict[str, Any] = {"method": name, "options": options, "contexts": {}}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
            if self.results["options"] != options:
                raise ValueError(
                    f"{self.file} was measured with {self.results['options']}; give the same options, or another"
                    " --results_dir."
                )

    def sampler(self, method: Method) -> Sampler:
        """What the method samples with, after its training unless that is done."""
        self._check_work_dir()
        trained = self.folder / "trained.json"
        if "seconds" not in self.results and trained.exists():  # for samples of another kind
            self.add(**json.loads(trained.read_text()))
        if "seconds" not in self.results:
            self.setting.latents()  # encoded once for all methods: not a part of this one's time
            start = time.monotonic()
            try:
                method.train(self.setting, self.folder)
            finally:
                spent = self.results.get("spent", 0.0) + time.monotonic() - start
                self.add(spent=spent)
            steps = method.steps(self.setting)
            record = {"seconds": spent, "unet_steps": steps, "commit": commit(), "machine": machine()}
            self.add(**record)
            self.folder.mkdir(parents=True, exist_ok=True)
            trained.write_text(json.dumps(record) + "\n")
        log = self.file.with_suffix(".csv")
        if not log.exists():
            write_log(self.folder, log)
        return method.load(self.setting, self.folder)

    def add_context(self, name: str, metrics: dict[str, Any]) -> None:
        """Keeps the metrics of a combination, with the commit that measured them."""
        self.results["contexts"][name] = metrics | {"commit": commit()}
        self.add()

    def add_counterfactuals(self, name: str, metrics: dict[str, Any]) -> None:
        """Keeps the metrics of counterfactuals under some interventions, with the commit that measured them."""
        self.add(counterfactuals=self.results.get("counterfactuals", {}) | {name: metrics | {"commit": commit()}})

    def add(self, **results: Any) -> None:
        """Keeps further results."""
        self.results.update(results)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        unfinished.replace(self.file)

    def _check_work_dir(self) -> None:
        """Weights in the working folder must be of a training with the same options."""
        file = self.folder.parent / "options.json"
        training = {key: value for key, value in self.results["options"].items() if key not in _OF_SAMPLING}
        if file.exists() and json.loads(file.read_text()) != training:
            raise ValueError(
                f"{self.folder.parent} has weights that were trained with {file.read_text()}; give the same options,"
                " or another --work_dir."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(training) + "\n")


def setting_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a program's options say of a [`Setting`]."""
    return {name: getattr(args, name) for name in _OF_SETTINGS}


def run_methods(
    names: Iterable[str],
    setting: Setting,
    options: dict[str, Any],
    results_dir: Path,
    measure: Callable[[MethodRun], None],
) -> None:
    """Runs methods one after the other, each with random numbers of the setting's seed."""
    for name in names:
        torch.manual_seed(setting.seed)
        np.random.seed(setting.seed)
        measure(MethodRun(name, setting, options, results_dir, f"steps{setting.train_steps}"))
