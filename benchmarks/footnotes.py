"""What a reader of the tables must know of a method's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from methods.quad_setting import QuadSetting
from methods.registry import create_methods

from diffusers_ctx.data import quad


LEARNED_SHARE = 0.5  # of the true change of an attribute


def unlearned_singles(interference: dict[str, Any]) -> list[str]:
    """The concepts whose single intervention moves their own attribute by less than half of the true change.

    A method that has not learned a single intervention says nothing about how well its composition works.

    Args:
        interference: result of `measure.measure_interference`.
    """
    columns = [quad.FACTORS.index(name) for name in quad.CONCEPTS]
    matrix, truth = (np.array(interference[key], dtype=float) for key in ("matrix", "true_matrix"))
    moved, should_move = (each[np.arange(len(columns)), columns] for each in (matrix, truth))
    learned = moved >= LEARNED_SHARE * should_move
    return [name for name, is_learned in zip(quad.CONCEPTS, learned) if not is_learned]


def expected_steps(results: dict[str, Any]) -> int | None:
    """UNet steps that a method would take today with the options of its results; `None` if time decides."""
    options = results["options"]
    setting = QuadSetting(
        dependent=not options["independent"],
        seed=options["seed"],
        images_per_context=options["images_per_context"],
        train_steps=options["train_steps"],
        concept_steps=options["concept_steps"],
        baseline_steps=options["baseline_steps"],
        num_inference_steps=options["num_inference_steps"],
        work_dir=Path(),
    )
    return create_methods(setting.dependent)[results["method"]].steps(setting)


def footnotes(results: dict[str, Any]) -> list[str]:
    """Footnotes of a method's row in the table."""
    notes = []
    if unlearned := unlearned_singles(results["interference"]):
        names = ", ".join(unlearned)
        notes.append(f"Not learned, as the single intervention moves less than half of the true change: {names}.")
    taken = results.get("unet_steps")
    if taken is not None and taken != expected_steps(results):
        notes.append(f"Trained for {taken:,} UNet steps; the code takes {expected_steps(results):,} now.")
    return notes
