"""Records of how a metric was measured, which go into the results file."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from methods.setting import device


def commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return described.stdout.strip()


def machine() -> str:
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The model's name, for which Python has nothing that works everywhere."""
    file = Path("/proc/cpuinfo")
    names = (line for line in file.read_text().splitlines() if line.startswith("model name")) if file.exists() else ()
    return next((line.split(": ")[1] for line in names), platform.processor() or platform.machine())


def adapter_digest(adapter: str | Path) -> str:
    """A hash of all weights of an adapter; the library's fingerprint is another, and results name adapters by this."""
    digest = hashlib.sha256()
    for file in sorted(Path(adapter).rglob("*.safetensors")):
        if not any(part.startswith("checkpoint-") for part in file.relative_to(adapter).parts):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def made_with(adapter: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """The record that goes beside the metrics of an adapter."""
    return {"adapter": adapter_digest(adapter), "options": options, "commit": commit(), "machine": machine()}


def write_metrics(file: Path | None, adapter: str | Path, options: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes what was measured of an adapter, where a file is given."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made_with(adapter, options) | metrics, indent=1) + "\n")
