"""The command line: help that answers at once, wrong use in one sentence, and what its commands make."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_components
from hub.conftest import write_adapter
from hub.hub_double import TOKEN, USER, HubDouble, run_client
from PIL import Image
from safetensors.numpy import load_file

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.commands import main
from diffusers_ctx.commands.program import program
from diffusers_ctx.data import quad


COMMANDS = ["demo", "check", "train", "evaluate", "sample", "counterfactual", "ui", "inspect", "export", "push"]
HEAVY = {
    "torch",
    "numpy",
    "PIL",
    "matplotlib",
    "transformers",
    "diffusers",
    "accelerate",
    "datasets",
    "gradio",
    "sklearn",
}


def test_help_answers_without_heavy_imports():
    calls = "; ".join(f"assert main(['{name}', '--help']) == 0" for name in COMMANDS)
    code = f"import sys; from diffusers_ctx.commands import main; main([]); {calls}; print(set(sys.modules) & {HEAVY})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("set()\n") and run.stdout.count("Examples:") == len(COMMANDS)


def test_commands_are_listed_in_the_order_of_their_use(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    places = [output.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places) and set(COMMANDS) == set(program.commands)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["chekc"], "No such command 'chekc'"),
        (["check"], "Missing argument 'DATA'"),
        (["check", "photos", "--contact", "a.png"], "--contact"),  # no prefix of --contact_sheet
        (["check", "photos", "--resolution", "0"], "0 is not in the range x>=1"),
        (
            ["sample", "quad", "--interventions", "quad1=2"],
            "the strength of 'quad1' is 2; strengths are numbers in [0, 1]",
        ),
        (["sample", "quad", "--interventions", "quad1+"], "write night, night+snow or night=0.5+snow"),
        (["sample", "quad", "--interventions", "quad1,size"], "Join concepts with '+', not ','"),
        (["sample", "quad", "--interventions", "nite+quad1"], "the adapter does not know nite; its concepts are"),
        (["counterfactual", "quad", "no.png", "--interventions", "size"], "there is no no.png"),
        (["counterfactual", "quad", __file__, "--interventions", "size"], "test_program.py cannot be read"),
        (["counterfactual", "quad", __file__, __file__, "--interventions", "size"], "called test_program"),
        (["push", "no-folder", "ada/weather"], "there is no no-folder"),
        (["export", "quad"], "Missing option '--output_dir'"),
        (["export", "quad", "--output_dir", "a", "--adapter_only", "--pretrained_model_name_or_path", "b"], "no base"),
        (["train"], "Give the flags of the training"),
        (["train", "--max_train_step", "5"], "'--max_train_step'"),
        (["train", "--pretrained_model_name_or_path", "b", "--max_train_steps", "x"], "invalid int value: 'x'"),
        (["train", "--pretrained_model_name_or_path", "b", "--train_data_dir", "d", "--rank", "0"], "`rank` is 0"),
        (["train", "--train_data_dir", "photos"], "required: --pretrained_model_name_or_path"),
        (["train", "no-such-file.yaml"], "no-such-file.yaml"),
        (["evaluate", "--max_samples", "5", "quad", "data"], "before the flags"),
        (["evaluate", "quad", "data", "--max_sample", "5"], "--max_samples"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("diffusers-ctx: ") and sentence in output.err
    assert "--help`" in output.err


@pytest.mark.parametrize("command", [[], ["sample"], ["train"]])
def test_help_has_a_short_flag(command, capsys):
    assert main([*command, "-h"]) == 0
    assert "--help" in capsys.readouterr().out


def test_adapters_that_are_damaged_are_one_sentence(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    assert main(["inspect", str(tmp_path / "adapter")]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "context_adapter_config.json" in output.err


def test_inspect_shows_what_the_files_hold(tmp_path, capsys):
    assert main(["inspect", "quad", "--json", "--graph", str(tmp_path / "graph.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = Path(embedded_adapter("quad"))
    assert facts["concepts"] == list(quad.CONCEPTS) and facts["mode"] == "lora"
    weights = load_file(folder / "context_module" / "diffusion_pytorch_model.safetensors")
    blocks = weights["causal.blocks"]
    expected = np.sqrt((blocks**2).sum(axis=(2, 3))) * (1 - np.eye(len(blocks)))
    np.testing.assert_allclose(facts["graph"]["strengths"], expected, rtol=1e-5)
    files = [folder / name for name in facts["bytes"] if name.endswith(".safetensors")]
    assert facts["weights"] == sum(array.size for file in files for array in load_file(file).values())
    assert Image.open(tmp_path / "graph.png").size[0] > 100

    assert main(["inspect", "quad"]) == 0
    output = capsys.readouterr().out
    assert f"{expected[1, 2]:.3f}  quad3 -> quad2" in output and f"{facts['weights']:,} weights" in output


def test_inspect_shows_the_metrics_of_the_card(tmp_path, capsys):
    from shutil import copytree

    from diffusers_ctx.adapter_format import read_adapter_config
    from diffusers_ctx.hub import render_model_card

    folder = copytree(embedded_adapter("quad"), tmp_path / "adapter")
    results = {"dataset": "quad", "metrics": {"SWD": {"obs": 0.25}}}
    render_model_card(read_adapter_config(folder), results=results).save(folder / "README.md")
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"SWD, obs (quad)": 0.25}


def test_samples_are_those_of_the_pipeline(tmp_path, capsys):
    arguments = ["sample", "quad", "--prompt", "a picture of a circle", "--num_images", "2", "--seed", "3"]
    arguments += ["--interventions", "obs", "--interventions", "quad1=0.5+quad4"]
    arguments += ["--num_inference_steps", "2", "--guidance_scale", "1", "--output_dir", str(tmp_path)]
    assert main(arguments) == 0
    names = ["obs-3.png", "obs-4.png", "quad1=0.5+quad4-3.png", "quad1=0.5+quad4-4.png", "grid.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a picture of a circle"] * 2,
        interventions={"quad1": 0.5, "quad4": 1.0},
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=2,
        guidance_scale=1.0,
    ).images
    for name, image in zip(names[2:4], images):
        assert np.abs(np.asarray(Image.open(tmp_path / name)).astype(int) - np.asarray(image)).max() <= 1


def test_counterfactuals_are_those_of_the_pipeline(tmp_path, capsys):
    image, other = map(Image.fromarray, quad.generate(["quad1"], n=2, seed=5).images)
    image.save(tmp_path / "photo.png")
    other.save(tmp_path / "other.png")
    photos = [str(tmp_path / name) for name in ("photo.png", "other.png")]
    arguments = ["counterfactual", "quad", *photos, "--factual_interventions", "quad1", "--batch_size", "1"]
    arguments += ["--interventions", "quad1+size", "--num_inference_steps", "2", "--output_dir", str(tmp_path)]
    assert main(arguments) == 0
    written = [tmp_path / name for name in ("photo-quad1+size.png", "other-quad1+size.png", "differences.png")]
    assert capsys.readouterr().out.split() == list(map(str, written))
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    expected = pipeline.counterfactual([image], ["quad1", "size"], ["quad1"], num_inference_steps=2).images[0]
    assert np.abs(np.asarray(Image.open(written[0])).astype(int) - np.asarray(expected)).max() <= 1
    assert Image.open(written[2]).size[0] > 300


def test_an_adapter_is_pushed(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    with HubDouble() as hub:
        code = "import sys; from diffusers_ctx.commands import main; sys.exit(main(sys.argv[1:]))"
        arguments = ["push", adapter, f"{USER}/weather", "--private", "--hub_token", TOKEN]
        run = run_client(code, *arguments, endpoint=hub.endpoint, hf_home=tmp_path)
        assert run.returncode == 0, run.stderr
        repository = hub.repos[f"{USER}/weather"]
    assert repository.private and "context_adapter.safetensors" in repository.branches["main"][-1].files
    assert f"{USER}/weather" in run.stdout


def test_a_training_is_launched_and_its_card_names_the_command(tmp_path, capfd):
    base, data, output = tmp_path / "base", tmp_path / "photos", tmp_path / "adapter"
    ComposablePipeline(**make_components(), requires_safety_checker=False).save_pretrained(base)
    rng = np.random.default_rng(0)
    for context in ("obs", "night"):
        (data / context).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / context / f"{index}.png")
    options = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": data,
        "output_dir": output,
        "resolution": 32,
        "concept_steps": 2,
        "concept_batch_size": 4,
        "train_batch_size": 2,
        "max_train_steps": 1,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    launcher = "--cpu --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    main(["train", *flags, "--launcher_flags", launcher])
    assert (output / "context_adapter.safetensors").is_file(), capfd.readouterr().err
    card = (output / "README.md").read_text()
    assert "accelerate launch -m diffusers_ctx.training --pretrained_model_name_or_path" in card
