"""A context adapter on a pipeline: attached, saved, loaded, unloaded, beside LoRA, and refused."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from conftest import CONCEPTS, SDXL_UNET, attach_random_module, make_components, make_context_module, make_pipeline
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from peft import LoraConfig

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module, context_attention_layers, saving
from diffusers_ctx.adapter_format import AdapterError, validate_adapter_folder
from diffusers_ctx.hub import push
from diffusers_ctx.hub.push import files_to_push


def sample(pipeline, **arguments) -> np.ndarray:
    defaults = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a picture of a circle", **(defaults | arguments)).images


def add_lora(pipeline, name: str, component: str = "unet", targets: tuple[str, ...] = ("to_q", "to_v")) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets))
    getattr(pipeline, component).add_adapter(config, name)


@pytest.fixture
def saved_adapter(plain_pipeline, tmp_path) -> Path:
    return attach_random_module(plain_pipeline).save_context_adapter(tmp_path / "adapter")


@pytest.fixture
def fresh_pipeline() -> ComposablePipeline:
    return make_pipeline()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_fresh_adapter_and_scale_zero_and_unload_are_the_plain_pipeline(plain_pipeline, guidance_scale):
    stock = StableDiffusionPipeline(**plain_pipeline.components, requires_safety_checker=False)
    expected = sample(stock, guidance_scale=guidance_scale)
    attach_context_module(plain_pipeline.unet, make_context_module())
    arguments = {"interventions": ["snow"], "guidance_scale": guidance_scale}
    np.testing.assert_array_equal(sample(plain_pipeline, **arguments), expected)
    plain_pipeline.unload_context_adapter()

    attach_random_module(plain_pipeline)
    assert np.abs(sample(plain_pipeline, **arguments) - expected).max() > 1e-3
    plain_pipeline.set_context_scale(0)
    np.testing.assert_array_equal(sample(plain_pipeline, **arguments), expected)
    plain_pipeline.set_context_scale(1)
    plain_pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(plain_pipeline, guidance_scale=guidance_scale), expected)
    np.testing.assert_array_equal(sample(stock, guidance_scale=guidance_scale), expected)
    assert plain_pipeline.context_module is None and plain_pipeline.concepts == []


def test_saving_and_loading_gives_the_same_images(plain_pipeline, fresh_pipeline, tmp_path):
    attach_random_module(plain_pipeline)
    folder = plain_pipeline.save_context_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "context_adapter.safetensors",
        "context_adapter_config.json",
        "context_module",
    ]
    fresh_pipeline.load_context_adapter(folder)
    assert fresh_pipeline.concepts == CONCEPTS
    for interventions in ([], ["snow"], {"night": 0.5, "fog": 1.0}):
        expected = sample(plain_pipeline, interventions=interventions)
        np.testing.assert_array_equal(sample(fresh_pipeline, interventions=interventions), expected)


def test_lora_mode_saves_the_lora_that_stock_diffusers_loads(plain_pipeline, fresh_pipeline, tmp_path):
    attach_random_module(plain_pipeline)
    add_lora(plain_pipeline, LORA_ADAPTER)
    folder = plain_pipeline.save_context_adapter(tmp_path / "adapter")
    assert json.loads((folder / "context_adapter_config.json").read_text())["mode"] == "lora"
    expected = sample(plain_pipeline, interventions=["snow"])

    stock = StableDiffusionPipeline(**make_components(), requires_safety_checker=False)
    stock.load_lora_weights(str(folder))
    assert stock.get_active_adapters()

    plain = sample(fresh_pipeline)
    fresh_pipeline.load_context_adapter(folder)
    np.testing.assert_array_equal(sample(fresh_pipeline, interventions=["snow"]), expected)
    fresh_pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(fresh_pipeline), plain)


def test_an_adapter_without_lora_saved_over_one_with_leaves_none_behind(plain_pipeline, saved_adapter, tmp_path):
    add_lora(plain_pipeline, LORA_ADAPTER)
    folder = plain_pipeline.save_context_adapter(tmp_path / "other")
    plain_pipeline.delete_adapters(LORA_ADAPTER)
    plain_pipeline.save_context_adapter(folder)
    names = [sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) for root in (folder, saved_adapter)]
    assert names[0] == names[1]
    assert json.loads((folder / "context_adapter_config.json").read_text())["mode"] == "frozen"


def test_an_adapter_of_mode_full_is_saved_again_as_one(plain_pipeline, saved_adapter, fresh_pipeline, tmp_path):
    def mode_of(pipeline, name: str) -> str:
        folder = pipeline.save_context_adapter(tmp_path / name)
        return json.loads((folder / "context_adapter_config.json").read_text())["mode"]

    fresh_pipeline.load_context_adapter(plain_pipeline.save_context_adapter(tmp_path / "first", mode="full"))
    assert mode_of(fresh_pipeline, "second") == "full"
    fresh_pipeline.unload_context_adapter()
    fresh_pipeline.load_context_adapter(saved_adapter)
    assert mode_of(fresh_pipeline, "third") == "frozen"


def test_an_adapter_of_mode_full_asks_for_its_own_pipeline_alone(plain_pipeline, tmp_path, monkeypatch, caplog):
    attach_random_module(plain_pipeline)
    plain_pipeline.save_context_adapter(tmp_path / "full", mode="full")
    plain_pipeline.save_pretrained(tmp_path / "full")
    assert "without its context adapter" not in caplog.text
    monkeypatch.chdir(tmp_path)
    ComposablePipeline.from_pretrained("full").load_context_adapter(tmp_path / "full")
    assert "load the pipeline from" not in caplog.text
    make_pipeline().load_context_adapter("full")
    assert "load the pipeline from 'full' as well" in caplog.text


def test_a_loaded_adapter_of_mode_full_is_pushed_with_its_pipeline(
    plain_pipeline, fresh_pipeline, tmp_path, monkeypatch
):
    attach_random_module(plain_pipeline)
    fresh_pipeline.load_context_adapter(plain_pipeline.save_context_adapter(tmp_path / "full", mode="full"))
    monkeypatch.setattr(saving, "push_adapter_folder", lambda folder, repo_id, **options: files_to_push(folder))
    files = fresh_pipeline.push_context_adapter("user/adapter")
    assert {"model_index.json", "unet/config.json", "context_adapter.safetensors", "README.md"} <= set(files)


def test_what_could_not_be_pushed_is_kept(saved_adapter, fresh_pipeline, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise TimeoutError("timed out")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(HfApi, "create_repo", fail)
    fresh_pipeline.load_context_adapter(saved_adapter)
    with pytest.raises(ConnectionError, match=r"All is saved in .*; complete the push with"):
        fresh_pipeline.push_context_adapter("user/adapter", token="hf_x")
    (kept,) = tmp_path.glob("context-adapter-*")
    assert validate_adapter_folder(kept)["concepts"] == fresh_pipeline.concepts
    with pytest.raises(LocalTokenNotFoundError):
        monkeypatch.setattr(push, "get_token", lambda: None)
        fresh_pipeline.push_context_adapter("user/adapter")
    assert list(tmp_path.glob("context-adapter-*")) == [kept]


@pytest.mark.parametrize("first", ["lora", "adapter"])
def test_a_lora_of_the_users_own_before_or_after(saved_adapter, fresh_pipeline, first):
    both = []
    for order in (["lora", "adapter"], ["adapter", "lora"]):
        pipeline = make_pipeline()
        for step in order:
            if step == "lora":
                add_lora(pipeline, "style")
            else:
                pipeline.load_context_adapter(saved_adapter)
        both.append(sample(pipeline, interventions=["snow"]))
        without_lora = sample(fresh_pipeline)
        pipeline.unload_lora_weights()
        assert pipeline.concepts == CONCEPTS
        pipeline.set_context_scale(0)
        np.testing.assert_array_equal(sample(pipeline), without_lora)
    np.testing.assert_array_equal(both[0], both[1])


@pytest.fixture
def lora_adapter(plain_pipeline, tmp_path):
    """A saved adapter with a LoRA of the UNet."""
    attach_random_module(plain_pipeline)
    add_lora(plain_pipeline, LORA_ADAPTER)
    return plain_pipeline.save_context_adapter(tmp_path / "adapter")


@pytest.fixture
def text_lora_adapter(plain_pipeline, lora_adapter):
    """A saved adapter with a LoRA of the text encoder too."""
    add_lora(plain_pipeline, LORA_ADAPTER, "text_encoder", ("q_proj", "out_proj"))
    return plain_pipeline.save_context_adapter(lora_adapter)


@pytest.mark.parametrize("where", [("unet",), ("text_encoder", ("q_proj", "v_proj"))])
def test_unloading_leaves_the_users_lora_beside_its_own(text_lora_adapter, fresh_pipeline, where):
    add_lora(fresh_pipeline, "style", *where)
    expected = sample(fresh_pipeline)
    fresh_pipeline.load_context_adapter(text_lora_adapter)
    model = fresh_pipeline.components[where[0]]
    assert model.active_adapters() == ["style", LORA_ADAPTER]
    fresh_pipeline.unload_context_adapter()
    assert list(model.peft_config) == ["style"]
    np.testing.assert_array_equal(sample(fresh_pipeline), expected)


def test_unloading_leaves_a_lora_of_the_text_encoder(lora_adapter, fresh_pipeline):
    add_lora(fresh_pipeline, "style", "text_encoder", ("q_proj", "v_proj"))
    expected = sample(fresh_pipeline)
    fresh_pipeline.load_context_adapter(lora_adapter)
    fresh_pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(fresh_pipeline), expected)


@pytest.mark.parametrize("folder", ["lora_adapter", "text_lora_adapter"])
def test_loras_are_loaded_without_a_word_of_models_that_have_none(
    folder, fresh_pipeline, request, caplog, monkeypatch
):
    folder = request.getfixturevalue(folder)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    fresh_pipeline.load_context_adapter(folder)
    assert not caplog.messages


def test_the_adapters_lora_of_the_text_encoder_comes_and_goes(plain_pipeline, text_lora_adapter, fresh_pipeline):
    adapted = sample(plain_pipeline, interventions=["snow"])
    plain = make_pipeline().text_encoder.state_dict()
    fresh_pipeline.load_context_adapter(text_lora_adapter)
    np.testing.assert_allclose(sample(fresh_pipeline, interventions=["snow"]), adapted, atol=1e-5)
    fresh_pipeline.unload_context_adapter()
    state = fresh_pipeline.text_encoder.state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)


def test_a_lora_of_the_adapters_name_is_left_alone(lora_adapter, fresh_pipeline):
    add_lora(fresh_pipeline, LORA_ADAPTER)
    expected = sample(fresh_pipeline)
    with pytest.raises(ValueError, match="delete_adapters"):
        fresh_pipeline.load_context_adapter(lora_adapter)
    np.testing.assert_array_equal(sample(fresh_pipeline), expected)


def test_gradient_checkpointing_gives_the_same_gradients(plain_pipeline):
    attach_random_module(plain_pipeline)
    unet, module = plain_pipeline.unet.train(), plain_pipeline.context_module
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32)
    mask = torch.eye(3)[:2]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        tokens = module(torch.ones(2, *module.noise_shape), mask)
        unet(x, 10, text, added_cond_kwargs={"image_embeds": [tokens]}).sample.square().mean().backward()
        gradients.append(module.mechanism.bias_do.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_torch_compile_makes_one_graph(plain_pipeline):
    attach_random_module(plain_pipeline)
    module = plain_pipeline.context_module
    tokens = module(torch.ones(1, *module.noise_shape), torch.eye(3)[:1])
    arguments = (torch.randn(1, 4, 16, 16), torch.tensor(10), torch.randn(1, 5, 32))
    kwargs = {"added_cond_kwargs": {"image_embeds": [tokens]}}
    with torch.no_grad():
        expected = plain_pipeline.unet(*arguments, **kwargs).sample
        compiled = torch.compile(plain_pipeline.unet, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments, **kwargs).sample, expected)


def test_a_compiled_unet_loads_saves_and_unloads(plain_pipeline, fresh_pipeline, tmp_path):
    plain = sample(plain_pipeline)
    attach_random_module(plain_pipeline)
    add_lora(plain_pipeline, LORA_ADAPTER)
    expected = sample(plain_pipeline, interventions=["snow"], context_guidance_scale=2.0)
    folder = plain_pipeline.save_context_adapter(tmp_path / "adapter")

    fresh_pipeline.unet = torch.compile(fresh_pipeline.unet, backend="eager")
    fresh_pipeline.load_context_adapter(folder)
    again = fresh_pipeline.save_context_adapter(tmp_path / "again")
    for path in folder.rglob("*.safetensors"):
        weights, saved = (safetensors.torch.load_file(root / path.relative_to(folder)) for root in (folder, again))
        assert weights.keys() == saved.keys()
    got = sample(fresh_pipeline, interventions=["snow"], context_guidance_scale=2.0)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    fresh_pipeline.unload_context_adapter()
    np.testing.assert_allclose(sample(fresh_pipeline), plain, atol=1e-5)


@pytest.mark.parametrize("lora", [None, "style", LORA_ADAPTER])
def test_save_pretrained_writes_the_plain_pipeline(plain_pipeline, tmp_path, caplog, lora):
    """Without the UNet's layers of a LoRA, whose names a plain model does not know, but with the user's own of the
    text encoder, which transformers loads."""
    expected = sample(plain_pipeline)
    if lora == "style":
        add_lora(plain_pipeline, lora, "text_encoder", ("q_proj", "v_proj"))
        expected = sample(plain_pipeline)
    attach_random_module(plain_pipeline)
    if lora is not None:
        add_lora(plain_pipeline, lora)
    if lora == LORA_ADAPTER:
        add_lora(plain_pipeline, lora, "text_encoder", ("q_proj", "v_proj"))
    adapted = sample(plain_pipeline, interventions=["snow"])
    plain_pipeline.save_pretrained(str(tmp_path))
    assert "call `save_context_adapter` or `push_context_adapter`" in caplog.text
    np.testing.assert_array_equal(sample(plain_pipeline, interventions=["snow"]), adapted)
    stock = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(stock) is StableDiffusionPipeline
    np.testing.assert_array_equal(sample(stock), expected)
    assert ("saved without the LoRAs ['style']; call `save_lora_weights`" in caplog.text) == (lora == "style")
    if lora == "style":  # saved over it without one, it has none
        plain_pipeline.text_encoder.delete_adapter("style")
        plain_pipeline.save_pretrained(str(tmp_path))
        assert not list((tmp_path / "text_encoder").glob("adapter*"))


def test_replaced_processors_are_noticed(plain_pipeline):
    attach_random_module(plain_pipeline)
    plain_pipeline.unet.set_default_attn_processor()
    with pytest.raises(RuntimeError, match="unload_context_adapter"):
        sample(plain_pipeline, interventions=["snow"])
    plain_pipeline.unload_context_adapter()
    sample(plain_pipeline)


def test_the_attention_of_the_plain_pipeline_is_kept(plain_pipeline):
    """Also where it is not the default: scale 0 and unloading give the very same numbers."""
    plain_pipeline.unet.set_default_attn_processor()
    expected = sample(plain_pipeline)
    attach_random_module(plain_pipeline).set_context_scale(0)
    np.testing.assert_array_equal(sample(plain_pipeline, interventions=["snow"]), expected)
    plain_pipeline.unload_context_adapter()
    assert {type(processor) for processor in plain_pipeline.unet.attn_processors.values()} == {AttnProcessor}
    np.testing.assert_array_equal(sample(plain_pipeline), expected)


def test_unfusing_after_unloading_gives_the_plain_pipeline(plain_pipeline):
    expected = sample(plain_pipeline)
    attach_random_module(plain_pipeline).fuse_qkv_projections()
    plain_pipeline.unload_context_adapter()
    plain_pipeline.unfuse_qkv_projections()
    np.testing.assert_array_equal(sample(plain_pipeline), expected)


def test_offloaded_weights_are_not_loaded_into(plain_pipeline, context_module):
    cpu_offload(plain_pipeline.unet, "cpu")
    with pytest.raises(ValueError, match="after loading"):
        attach_context_module(plain_pipeline.unet, context_module)
    assert not next(context_module.parameters()).is_meta


def test_a_second_adapter_is_refused(plain_pipeline, saved_adapter):
    before = sample(plain_pipeline, interventions=["snow"])
    with pytest.raises(ValueError, match="unload_context_adapter"):
        plain_pipeline.load_context_adapter(saved_adapter)
    np.testing.assert_array_equal(sample(plain_pipeline, interventions=["snow"]), before)


def test_methods_without_an_adapter_say_so(plain_pipeline, tmp_path):
    for call in (
        lambda: plain_pipeline.save_context_adapter(tmp_path / "adapter"),
        lambda: plain_pipeline.set_context_scale(1),
        lambda: plain_pipeline.push_context_adapter("user/adapter"),
        lambda: sample(plain_pipeline, interventions=["snow"]),
        lambda: plain_pipeline.counterfactual(torch.zeros(1, 3, 32, 32)),
        lambda: plain_pipeline.infer_exogenous_noise(torch.zeros(1, 3, 32, 32)),
    ):
        with pytest.raises(ValueError, match="load_context_adapter"):
            call()
    assert not (tmp_path / "adapter").exists()
    plain_pipeline.unload_context_adapter()


# adapters that must be refused, leaving the pipeline as it was


def wrong_width(folder: Path) -> dict:
    return make_components(cross_attention_dim=64)


def wrong_prediction_type(folder: Path) -> dict:
    return make_components(prediction_type="epsilon")


def truncated(folder: Path) -> None:
    path = folder / "context_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def foreign_layers(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "context_adapter.safetensors")
    weights = {f"other/{name}": weight for name, weight in weights.items()}
    safetensors.torch.save_file(weights, folder / "context_adapter.safetensors")


def no_module(folder: Path) -> None:
    shutil.rmtree(folder / "context_module")


def other_module_weights(folder: Path) -> None:
    """As if saved by a version whose layers had other names."""
    path = folder / "context_module" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights = {name.replace("read_out", "renamed"): weight for name, weight in weights.items()}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def newer_format(folder: Path) -> None:
    path = folder / "context_adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


def broken_lora(folder: Path) -> None:
    path = folder / "context_adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mode": "lora"}))
    safetensors.torch.save_file({"foreign": torch.ones(1)}, folder / "pytorch_lora_weights.safetensors")


def lora_of_wider_layers(folder: Path) -> None:
    broken_lora(folder)
    state = {"lora_A.weight": torch.ones(2, 7), "lora_B.weight": torch.ones(7, 2)}
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{layer}.{name}": weight for name, weight in state.items()}
    safetensors.torch.save_file(state, folder / "pytorch_lora_weights.safetensors")


def lora_of_other_layers(folder: Path) -> None:
    broken_lora(folder)
    state = {"unet.nowhere.lora_A.weight": torch.ones(2, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 2)}
    safetensors.torch.save_file(state, folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_width, "cross_attention_dim is 64, not 32"),
        (wrong_prediction_type, "prediction_type is epsilon, not v_prediction"),
        (truncated, "context_adapter.safetensors"),
        (foreign_layers, "does not fit"),
        (no_module, "context_module"),
        (other_module_weights, "saved by another version"),
        (newer_format, "upgrade"),
        (broken_lora, r"pytorch_lora_weights.safetensors does not fit .*layers of \['foreign'\] not found"),
        (lora_of_wider_layers, "does not fit the base model.*size mismatch"),
        (lora_of_other_layers, "does not fit the base model.*not found"),
    ],
)
def test_unfit_adapters_leave_the_pipeline_as_it_was(saved_adapter, spoil, message):
    components = spoil(saved_adapter) or make_components()
    pipeline = ComposablePipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    before, processors = sample(pipeline), {type(p) for p in pipeline.unet.attn_processors.values()}
    with pytest.raises(AdapterError, match=message):
        pipeline.load_context_adapter(saved_adapter)
    assert pipeline.context_module is None and pipeline.unet.encoder_hid_proj is None
    assert {type(p) for p in pipeline.unet.attn_processors.values()} == processors
    np.testing.assert_array_equal(sample(pipeline), before)


def test_full_size_configs_on_the_meta_device():
    """Where the adapter attaches in SD 1.5, SD 2.1 and SDXL, and how many parameters it has there."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    shared = {"sample_size": 64, "layers_per_block": 2}
    sd = {"block_out_channels": (320, 640, 1280, 1280)} | shared
    configs = {
        "SD 1.5": sd | {"cross_attention_dim": 768, "attention_head_dim": 8},
        "SD 2.1": sd
        | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "SDXL": SDXL_UNET,
    }
    layers = {"SD 1.5": 16, "SD 2.1": 16, "SDXL": 70}
    widths = {  # output channels of every cross-attention layer, summed
        "SD 1.5": 5 * 320 + 5 * 640 + 6 * 1280,
        "SD 2.1": 5 * 320 + 5 * 640 + 6 * 1280,
        "SDXL": 2 * 2 * 640 + 2 * 10 * 1280 + 3 * 10 * 1280 + 3 * 2 * 640 + 10 * 1280,
    }
    for name, config in configs.items():
        with init_empty_weights():
            unet = UNet2DConditionModel(**config)
            module = make_module_on_meta(config["cross_attention_dim"])
            attach_context_module(unet, module)
        attention = context_attention_layers(unet)
        assert len(attention) == layers[name]
        parameters = sum(parameter.numel() for parameter in attention.parameters())
        assert parameters == 2 * widths[name] * config["cross_attention_dim"]


def make_module_on_meta(token_dim: int):
    from diffusers_ctx import ContextModule

    return ContextModule(CONCEPTS, token_dim=token_dim, posterior_sample_size=64)
