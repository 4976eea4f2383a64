"""Options: their choices and bounds, in Python and on the command line, and files of them."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from diffusers.optimization import SchedulerType

from diffusers_ctx import training
from diffusers_ctx.options import OptionParser
from diffusers_ctx.training import (
    ContextConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    TrainingConfig,
    parse_training_config,
)
from diffusers_ctx.training.config import GROUPS, Schedule
from diffusers_ctx.training.run.record import flatten_options


PLAIN = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "photos"]
CHOICES = {
    "mode": "frozen,lora,full",
    "injection": "cross_attention,prompt",
    "prediction_type": "epsilon,v_prediction,sample",
    "causal_form": "structural,reduced_form",
    "posterior_type": "inverse,amortized",
    "posterior_encoder": "vae,unet,transformer,clip",
    "lr_scheduler": "linear,cosine,cosine_with_restarts,polynomial,constant,constant_with_warmup",
    "timestep_sampling": "uniform,logit_normal,high_noise",
    "optimizer": "adamw,adamw_8bit,prodigy",
    "mixed_precision": "no,fp16,bf16",
}


def group_with(**options):
    """The group that has these options."""
    (group,) = (group for group in GROUPS if options.keys() <= {option.name for option in fields(group)})
    return group(**({"pretrained_model_name_or_path": "base"} if group is ModelConfig else {}) | options)


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_choices_are_listed_by_help_and_held_to_on_the_command_line_and_in_python(name, choices, capsys):
    shown = " ".join(OptionParser(GROUPS).format_help().split())
    assert f"--{name} {{{choices}}}" in shown
    for choice in choices.split(","):
        assert flatten_options(parse_training_config([*PLAIN, f"--{name}", choice]))[name] == choice
        group_with(**{name: choice})
    with pytest.raises(SystemExit):
        parse_training_config([*PLAIN, f"--{name}", "frosen"])
    assert f"argument --{name}" in (error := capsys.readouterr().err) and choices.split(",")[-1] in error
    listed = re.escape(str(choices.split(",")))
    with pytest.raises(ValueError, match=f"`{name}` is 'frosen'; choose one of {listed}"):
        group_with(**{name: "frosen"})


def test_the_schedules_are_diffusers_own():
    assert {*get_args(Schedule), "piecewise_constant"} == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_batch_size", 0, "1 or more"),
        ("rank", 0, "1 or more"),
        ("concept_steps", 1, "2 or more"),
        ("proportion_empty_prompts", 1.5, "in [0, 1]"),
        ("kl_warmup_steps", 0, "1 or more"),
        ("kl_weight", -1.0, "0 or more"),
        ("num_hidden_factors", -1, "0 or more"),
        ("concept_learning_rate", 0.0, "above 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", float("inf"), "finite"),
        ("noise_offset", float("nan"), "finite"),
        ("validation_guidance_scale", float("nan"), "finite"),
        ("max_grad_norm", float("nan"), "above 0"),
        ("max_grad_norm", 0.0, "above 0"),
        ("seed", 2**32, "in [0, 4294967295]"),
        ("seed", -1, "in [0, 4294967295]"),
        ("snr_gamma", -5.0, "above 0"),
        ("adam_beta1", 1.0, "in [0, 1)"),
        ("adam_weight_decay", -0.1, "0 or more"),
        ("adam_epsilon", 0.0, "above 0"),
        ("ema_decay", 2.0, "in [0, 1]"),
        ("lr_warmup_steps", -1, "0 or more"),
        ("checkpointing_steps", 0, "1 or more"),
        ("checkpoints_total_limit", 0, "1 or more"),
        ("unfreeze_after", 1.0, "in [0, 1)"),
    ],
)
def test_numbers_out_of_bounds(name, value, message):
    for give in (lambda: group_with(**{name: value}), lambda: parse_training_config([*PLAIN, f"--{name}={value}"])):
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value}; it must be {message}.")):
            give()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", float("inf")), ("seed", 2**32 - 1), ("ema_decay", 1.0), ("unfreeze_after", 0.0), ("rank", 1)],
)
def test_numbers_at_their_bounds(name, value):
    assert getattr(group_with(**{name: value}), name) == value
    assert flatten_options(parse_training_config([*PLAIN, f"--{name}={value}"]))[name] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"mode": "frozen", "train_text_encoder": True}}, "mode frozen has none; choose mode lora"),
        ({"model": {"mode": "full", "train_text_encoder": True}}, "`train_text_encoder` .* mode full has none"),
        ({"output": {"validation_interventions": ["night+snow"]}}, "give a `validation_prompt`"),
        ({"data": {"dataset_name": "photos"}}, "either `train_data_dir` or `dataset_name`"),
        ({"data": {"train_data_dir": None}}, "either `train_data_dir` or `dataset_name`"),
    ],
)
def test_options_that_contradict_one_another(changes, message):
    def configure(model=(), data=(), output=()) -> TrainingConfig:
        return TrainingConfig(
            ModelConfig(**{"pretrained_model_name_or_path": "base"} | dict(model)),
            DataConfig(**{"train_data_dir": "photos"} | dict(data)),
            ContextConfig(),
            OptimizationConfig(),
            OutputConfig(**dict(output)),
        )

    assert configure() == parse_training_config(PLAIN)
    with pytest.raises(ValueError, match=message):
        configure(**changes)


def test_the_groups_are_public():
    assert {group.__name__ for group in GROUPS} <= set(training.__all__)


def test_where_the_images_are():
    names = {"image_column": "photo", "context_column": "regime", "text_column": "caption"}
    names |= {"name": "large", "split": "test", "cache_dir": "cache"}
    folder = DataConfig(
        train_data_dir="photos",
        image_column="photo",
        context_column="regime",
        caption_column="caption",
        dataset_config_name="large",
        dataset_split="test",
        cache_dir="cache",
    )
    assert folder.source_options() == {"source": Path("photos")} | names
    assert DataConfig(dataset_name="some/set").source_options()["source"] == "some/set"


# files


def parse_yaml(folder: Path, line: str) -> TrainingConfig:
    file = folder / "options.yaml"
    file.write_text(f"pretrained_model_name_or_path: base\ntrain_data_dir: photos\n{line}\n")
    return parse_training_config([str(file)])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 0.0001", "learning_rate", 1e-4),
        ("snr_gamma: 5", "snr_gamma", 5.0),
        ("max_train_steps: null", "max_train_steps", None),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("mixed_precision: bf16", "mixed_precision", "bf16"),
        ("random_flip: true", "random_flip", True),
        ("concepts: night", "concepts", ["night"]),
        ("concepts: [night, snow]", "concepts", ["night", "snow"]),
        ("validation_prompt: x\nvalidation_interventions: night+snow", "validation_interventions", ["night+snow"]),
    ],
)
def test_values_of_a_yaml_file(tmp_path, line, name, value):
    read = flatten_options(parse_yaml(tmp_path, line))[name]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", "`learning_rate` is 'fast'; give a number"),
        ("learning_rate: true", "`learning_rate` is True; give a number"),
        ("max_train_steps: 1e3", "`max_train_steps` is '1e3'; give an integer"),
        ("train_batch_size: 3.0", "`train_batch_size` is 3.0; give an integer"),
        ("train_batch_size: null", "`train_batch_size` is None; give an integer"),
        ("random_flip: 'false'", "`random_flip` is 'false'; give true or false"),
        ("dataset_config_name: 2024", "`dataset_config_name` is 2024; give text, in quotes"),
        ("concepts: [night, no]", r"`concepts` is \['night', False\]; give a list of texts"),
        ("concepts: 3", "`concepts` is 3; give a list of texts"),
        ("mixed_precision: no", "`mixed_precision` is False; give text, in quotes"),
        ("mode: 3", "`mode` is 3; give text"),
        ("mode: frosen", r"`mode` is 'frosen'; choose one of \['frozen', 'lora', 'full'\]"),
        ("rank: 0", "`rank` is 0; it must be 1 or more"),
    ],
)
def test_values_of_a_yaml_file_that_are_not_of_their_options_type(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(tmp_path, line)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "", "a.yaml holds no options; write each as"),
        ("a.yaml", "- mode: lora\n", "a.yaml holds no options; write each as"),
        ("a.json", "[1]", "a.json holds no options; write each as"),
        ("a.yaml", "mode: [lora\n", "a.yaml is no valid YAML: "),
        ("a.json", "{'mode': 'lora'}", "a.json is no valid JSON: "),
        ("a.yaml", "lerning_rate: 1e-4\n", "a.yaml: there is no option `lerning_rate`; did you mean `learning_rate`?"),
        ("a.yaml", "xyz: 1\n", "a.yaml: there is no option `xyz`; `--help` lists all"),
    ],
)
def test_files_that_are_not_of_options(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_training_config([str(tmp_path / name)])


def test_a_file_and_flags_without_a_base_model(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("train_data_dir: photos\n")
    with pytest.raises(SystemExit):
        parse_training_config([str(tmp_path / "a.yaml")])
    assert "required: --pretrained_model_name_or_path" in capsys.readouterr().err


def test_flags_after_a_file_override_it(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("train_data_dir: photos\nlearning_rate: 1e-5\nrank: 4\nconcepts: [snow]\nrandom_flip: true\n")
    flags = "--pretrained_model_name_or_path base --rank 8 --resume_from_checkpoint latest --random_flip false"
    got = flatten_options(parse_training_config([str(file), *flags.split()]))
    changed = {"train_data_dir": "photos", "learning_rate": 1e-5, "rank": 8, "concepts": ["snow"]}
    changed |= {"pretrained_model_name_or_path": "base", "resume_from_checkpoint": "latest", "random_flip": False}
    assert got == flatten_options(parse_training_config(PLAIN)) | changed
