"""What learns in each mode, by name, and from when on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_components
from diffusers import PNDMScheduler

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.training.diffusion.trainable import count_learned, prepare_mode, split_parameters

from .conftest import WITHOUT_SEARCH, create_trainer, load_trainer, make_options


ATTENTION = [
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
]
LAYERS = [f"{block}.transformer_blocks.0.attn{number}" for block in ATTENTION for number in (1, 2)]
MODULE = "encoder_hid_proj.image_projection_layers.0.context_module."
READ_OUT = re.compile(re.escape(MODULE) + r"read_out\.")
CONTEXT_ATTENTION = re.compile(r"\.attn2\.processor\.to_[kv]_ip\.0\.weight$")


def learning(unet) -> set[str]:
    return {name for name, parameter in unet.named_parameters() if parameter.requires_grad}


def adapter_names(unet) -> set[str]:
    read_out = {name for name, _ in unet.named_parameters() if READ_OUT.match(name)}
    assert len(read_out) == len(list(unet.get_submodule(MODULE + "read_out").parameters())) > 0
    processors = {f"{layer}.processor" for layer in LAYERS if layer.endswith("attn2")}
    return read_out | {f"{name}.to_{part}_ip.0.weight" for name in processors for part in "kv"}


@pytest.fixture
def unet(plain_pipeline, context_module):
    attach_context_module(plain_pipeline.unet, context_module)
    context_module.requires_grad_(True).read_out.requires_grad_(False)  # as learning the concepts leaves it
    return plain_pipeline.unet


def test_frozen(unet):
    prepare_mode(unet, "frozen", rank=2)
    assert learning(unet) == adapter_names(unet)
    assert not any("lora" in name for name, _ in unet.named_parameters())


def test_lora(unet):
    prepare_mode(unet, "lora", rank=3)
    lora = {
        f"{layer}.{target}.lora_{matrix}.context.weight"
        for layer in LAYERS
        for target in ("to_q", "to_k", "to_v", "to_out.0")
        for matrix in "AB"
    }
    assert learning(unet) == adapter_names(unet) | lora
    assert {unet.get_parameter(name).shape[0] for name in lora if "lora_A" in name} == {3}


def test_full(unet):
    backbone = {name for name, _ in unet.named_parameters() if not (MODULE in name or CONTEXT_ATTENTION.search(name))}
    assert len(backbone) > 100
    prepare_mode(unet, "full", rank=2)
    assert learning(unet) == adapter_names(unet) | backbone


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_what_will_learn_is_counted_before(unet, mode):
    count = count_learned(unet, mode, rank=3)
    prepare_mode(unet, mode, rank=3)
    assert count == sum(parameter.numel() for part in split_parameters(unet) for parameter in part)


def test_what_text_encoders_will_learn_is_counted_too(unet, plain_pipeline):
    models = unet, "lora", 3, [plain_pipeline.text_encoder]
    count = count_learned(*models)
    assert count > count_learned(unet, "lora", rank=3)
    prepare_mode(*models)
    assert count == sum(p.numel() for part in split_parameters(unet, [plain_pipeline.text_encoder]) for p in part)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_adapter_and_backbone_are_told_apart(unet, mode):
    prepare_mode(unet, mode, rank=2)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    adapter, backbone = ([names[id(parameter)] for parameter in part] for part in split_parameters(unet))
    assert sorted(adapter) == sorted(adapter_names(unet))
    assert set(backbone) == learning(unet) - adapter_names(unet)
    assert (mode == "frozen") == (not backbone)


def trained_at(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by the parameter's name in the UNet."""
    weights = safetensors.torch.load_file(output_dir / f"checkpoint-{step}" / "trained.safetensors")
    return {name.removeprefix("unet."): weight for name, weight in weights.items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_backbone_waits_for_the_adapter(options, mode):
    options |= {"mode": mode, "max_train_steps": 4, "unfreeze_after": 0.5, "checkpointing_steps": 1}
    output_dir = create_trainer(options | {"learning_rate": 1e-3}).train()
    states = [trained_at(output_dir, step) for step in range(1, 5)]
    adapter = {name for name in states[0] if READ_OUT.match(name) or CONTEXT_ATTENTION.search(name)}
    module = {name for name in states[0] if name.startswith(MODULE)} - adapter
    backbone = states[0].keys() - adapter - module
    assert adapter and module and (mode == "frozen") == (not backbone)
    assert moved(states[0], states[1]) == adapter
    assert moved(states[1], states[3]) == adapter | backbone


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_in_half_precision_what_learns_is_not_rounded(options, base_model, mode):
    options |= {"mode": mode, "mixed_precision": "bf16", "unfreeze_after": 0.5, "checkpointing_steps": 1}
    trainer = create_trainer(options)
    output_dir = trainer.train()
    before, after = trained_at(output_dir, 1), trained_at(output_dir, 2)
    assert {weight.dtype for weight in (before | after).values()} == {torch.float32}
    base = safetensors.torch.load_file(base_model / "unet" / "diffusion_pytorch_model.safetensors")
    if mode == "full":
        assert all(torch.equal(before[name], weight) for name, weight in base.items())  # not yet unfrozen
        assert all(not torch.equal(after[name], weight) for name, weight in base.items())
    else:
        frozen = trainer.pipeline.unet.state_dict()  # in float32 again, to be saved
        rounded = base["conv_in.weight"].bfloat16().float()
        assert torch.equal(frozen["conv_in.weight"].cpu(), rounded) and not before.keys() & base.keys()


# from predicting the noise to v-prediction with zero terminal SNR


@pytest.fixture
def epsilon_base(tmp_path) -> Path:
    folder = tmp_path / "epsilon-base"
    components = make_components(prediction_type="epsilon")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    components["scheduler"] = PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1)
    ComposablePipeline(**components, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_another_prediction_type_is_learned_and_brought_along(options, epsilon_base, mode):
    options |= {"pretrained_model_name_or_path": str(epsilon_base), "mode": mode}
    assert "unfreeze_after" not in options  # by default, the UNet learns from the first step on
    trainer = create_trainer(options | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    output_dir = trainer.train()
    assert trainer.contract["unfreeze_step"] == 0
    scheduler = trainer.adapter_stage.objective.noising.scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] == 0

    pipeline = ComposablePipeline.from_pretrained(output_dir if mode == "full" else epsilon_base, safety_checker=None)
    pipeline.load_context_adapter(output_dir)
    schedule = pipeline.scheduler.config
    assert schedule.prediction_type == "v_prediction"
    assert schedule.rescale_betas_zero_snr and schedule.timestep_spacing == "trailing"
    images = pipeline("a street", interventions=["snow"], num_inference_steps=2, output_type="np").images
    assert np.isfinite(images).all()


def test_what_cannot_be_learned_is_refused(options, epsilon_base):
    options |= {"pretrained_model_name_or_path": str(epsilon_base)}
    with pytest.raises(ValueError, match="A frozen UNet cannot learn another noise schedule"):
        load_trainer(options | {"mode": "frozen", "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="zero terminal SNR needs `--prediction_type v_prediction`"):
        load_trainer(options | {"rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match="zero terminal SNR needs `--prediction_type v_prediction`"):
        load_trainer(options | {"pretrained_model_name_or_path": embedded_base(), "prediction_type": "epsilon"})


def test_gradient_checkpointing_changes_no_result(base_model, photos, tmp_path):
    folders = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        changes = WITHOUT_SEARCH | {"gradient_checkpointing": checkpointing, "max_train_steps": 4}
        create_trainer(make_options(base_model, photos, folder, mode="lora", unfreeze_after=0.5, **changes)).train()
        folders.append(folder)
    for name in ("context_adapter.safetensors", "pytorch_lora_weights.safetensors"):
        plain, checkpointed = (safetensors.torch.load_file(folder / name) for folder in folders)
        for key, weight in plain.items():
            torch.testing.assert_close(checkpointed[key], weight, atol=1e-5, rtol=1e-4)


def test_a_full_pipeline_that_learned_in_bf16_is_saved_in_float32_and_samples(base_model, photos, tmp_path):
    changes = WITHOUT_SEARCH | {"mode": "full", "mixed_precision": "bf16"}
    trainer = create_trainer(make_options(base_model, photos, tmp_path / "full", **changes))
    folder = trainer.train()
    pipeline = ComposablePipeline.from_pretrained(folder, safety_checker=None)
    assert {model.dtype for model in (pipeline.unet, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    pipeline.load_context_adapter(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a street", interventions=["snow"], num_inference_steps=2, output_type="np").images
    assert np.isfinite(images).all()
    again = trainer.pipeline.save_context_adapter(tmp_path / "again")
    assert json.loads((again / "context_adapter_config.json").read_text())["mode"] == "full"
