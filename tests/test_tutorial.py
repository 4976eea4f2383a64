"""The tutorial runs from its first line to its last, offline, against a Hub on loopback.

By default with few images and steps, and in processes that need not import the library again; `pytest -m slow` runs it
word for word.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from forked import ForkedProgram, complete, run_script
from hub.hub_double import TOKEN, USER, HubDouble, run_client
from PIL import Image

from diffusers_ctx import ComposablePipeline, embedded_base


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
FEWER = {
    r"\bn=\d+": "n=8",
    r"(--(concept|max_train)_steps) \d+": r"\1 2",
    r"(--(concept|train)_batch_size) \d+": r"\1 6",
    r"(num_inference_steps)([= ])\d+": r"\1\g<2>2",
    r"(--num_counterfactuals) \d+": r"\1 1",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of a page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def follow(folder: Path, hub: HubDouble, fewer: bool) -> None:
    """Runs every block of the tutorial in order, in a folder that has of the repository what the commands name."""
    for name in ("diffusers_ctx", "train_scripts"):
        (folder / name).symlink_to(ROOT / name)
    session: dict = {}
    for language, code in blocks(PAGE):
        for pattern, replacement in FEWER.items() if fewer else ():
            code = re.sub(pattern, replacement, code)
        if language == "python" and "push_adapter_folder" in code:  # a process of its own, which is not offline
            client = run_client(code, endpoint=hub.endpoint, hf_home=folder, HF_TOKEN=TOKEN)
            assert client.returncode == 0, client.stderr
            assert client.stdout.strip() == f"{USER}/quad-tutorial"
        elif language == "python":
            exec(compile(code, "tutorial.md", "exec"), session)
        else:
            assert language == ""
            program, subcommand, *arguments = shlex.split(code.replace("\\\n", " "))
            assert (program, subcommand) == ("accelerate", "launch")
            environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
            run = (run_in_fork if fewer else launch)(arguments, environment)
            assert run.returncode == 0, run.stderr


def launch(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("accelerate"), "launch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)


def run_in_fork(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the script that these arguments of `accelerate launch` name."""
    options = launch_command_parser().parse_args(arguments)
    script = ForkedProgram(
        run_script, Path(options.training_script), options.training_script_args, environment=environment
    )
    return complete(script, timeout=600)


@pytest.mark.parametrize("fewer", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few-steps", "as-written"])
def test_the_tutorial_runs(fewer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HubDouble() as hub:
        follow(tmp_path, hub, fewer)
        pushed = set(hub.repos[f"{USER}/quad-tutorial"].branches["main"][-1].files)
    work = tmp_path / "runs" / "tutorial"
    assert {"context_adapter.safetensors", "context_adapter_config.json", "README.md"} <= pushed
    assert not any("checkpoint" in name or "logs" in name for name in pushed)
    assert Image.open(work / "composed.png").size == (6 * 64, 4 * 64)
    assert Image.open(work / "counterfactual.png").size == (2 * 64, 64)
    report = (work / "results" / "results.md").read_text(encoding="utf-8")
    assert all(context in report for context in ("obs", "quad1", "quad4", "quad1+quad4"))
    assert (work / "results" / "grid.png").exists()
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(work / "adapter")
    assert pipeline.concepts == ["quad1", "quad4"]
