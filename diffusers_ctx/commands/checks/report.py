"""All checks of a dataset, and what they found, for people and for machines."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ...context.names import normal_name
from ...data import load_context_dataset
from ...paths import local_path
from .captions import find_telling_captions
from .duplicates import find_duplicates
from .expectations import expectations
from .findings import Finding, Problem, Remark
from .images import ImageTable, read_images
from .pairs import find_pairs
from .sizes import find_imbalance, find_small_and_unlike_sizes
from .two_sample import TwoSampleTest, find_untold_contexts


@dataclass(frozen=True)
class DataReport:
    """What the checks know and found.

    Attributes:
        dataset: the images that can be read, as [`load_context_dataset`] has them.
        table: what is known of each.
        findings: problems first.
        tests: by context, how well it is told from the observational one; `None` where that was not tested.
        expected: sentences about what to expect of this many images.
    """

    dataset: Dataset
    table: ImageTable
    findings: list[Finding]
    tests: dict[str, TwoSampleTest | None]
    expected: list[str]

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if isinstance(finding, Problem)]

    @property
    def contexts(self) -> dict[str, dict[str, Any]]:
        """Number of images and captions of each context, and the shorter sides of its images."""
        shorter = self.table.sizes.min(axis=1)
        found = {}
        for context in self.table.names:
            rows = self.table.rows(context)
            found[context] = {
                "images": len(rows),
                "captions": sum(bool(self.table.captions[row].strip()) for row in rows),
                "shorter_side": [int(size) for size in np.quantile(shorter[rows], (0, 0.5, 1))],
            }
        return found

    def as_json(self) -> dict[str, Any]:
        """The same as numbers, lists and mappings."""
        return {
            "contexts": self.contexts,
            "problems": [_as_json(finding) for finding in self.problems],
            "remarks": [_as_json(finding) for finding in self.findings if not isinstance(finding, Problem)],
            "two_sample_tests": {context: test and vars(test) for context, test in self.tests.items()},
            "expected": self.expected,
        }


def check_data(
    source: str | Path,
    *,
    obs_context: str = "obs",
    text_column: str = "text",
    resolution: int | None = None,
    seed: int = 0,
) -> DataReport:
    """Checks images in contexts before an adapter is trained on them.

    Args:
        source: what [`~data.load_context_dataset`] reads.
        obs_context: the observational context's name.
        text_column: the column of captions.
        resolution: height and width of the images in training; smaller ones are a problem.
        seed: seed of the tests.

    Raises:
        FileNotFoundError: if there is no such data.
        ValueError: if the data cannot be trained on at all, such as without an observational context.
    """
    dataset, findings = _load(source, obs_context=obs_context, text_column=text_column)
    obs_context = normal_name(obs_context)
    table = read_images(dataset, local_path(source) if local_path(source).is_dir() else None)
    findings += find_imbalance(table)
    findings += find_small_and_unlike_sizes(table, resolution)
    findings += find_duplicates(table)
    findings += find_telling_captions(table)
    findings += find_pairs(table, obs_context, seed)
    tests: dict[str, TwoSampleTest | None] = {}
    if importlib.util.find_spec("sklearn") is None:
        message = (
            "Whether contexts can be told apart was not tested; `pip install 'diffusers-ctx[eval]'` has the test."
        )
        findings.append(Remark("two-sample test", message))
    else:
        untold, tests = find_untold_contexts(table, obs_context, seed)
        findings += untold
    findings.sort(key=lambda finding: not isinstance(finding, Problem))
    return DataReport(dataset, table, findings, tests, expectations(table.contexts.tolist(), table.captions))


def _load(source: str | Path, **options: Any) -> tuple[Dataset, list[Finding]]:
    """The images that can be read, and which cannot, and what the loader warns of."""
    try:
        return _load_and_note(source, **options)
    except ValueError as refused:
        error = refused
        try:
            dataset, remarks = _load_and_note(source, skip_unreadable=True, **options)
        except ValueError:
            raise refused from None
    # only images that cannot be read were in the way; the loader's warning says the same again
    unreadable = str(error).partition(". Repair")[0]
    remarks = [remark for remark in remarks if not remark.message.startswith(unreadable)]
    return dataset, [Problem("unreadable images", f"{unreadable}. Repair or remove them."), *remarks]


def _load_and_note(source: str | Path, **options: Any) -> tuple[Dataset, list[Finding]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_context_dataset(source, **options)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return dataset, [Remark("reading", message) for message in said]


def _as_json(finding: Finding) -> dict[str, Any]:
    return {"check": finding.check, "message": finding.message, **finding.details}
