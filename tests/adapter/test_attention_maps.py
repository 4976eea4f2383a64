"""Attention to context tokens: gathered without a trace on the images, and where it ought to be."""

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_context_module
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from PIL import Image

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.adapter import attach_context_module, collect_attention


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


def sample(pipeline, **arguments) -> np.ndarray:
    defaults = {"num_inference_steps": 2, "output_type": "np", "interventions": ["snow"], "guidance_scale": 5.0}
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline(["a circle", "a square"], generator=generator, **(defaults | arguments)).images


def count_hooks(unet) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"context_guidance_scale": 2.0}], ids=str)
def test_images_are_the_same_and_no_hook_is_left(plain_pipeline, arguments):
    attach_random_module(plain_pipeline)
    expected, hooks = sample(plain_pipeline, **arguments), count_hooks(plain_pipeline.unet)
    with collect_attention(plain_pipeline.unet) as maps:
        np.testing.assert_array_equal(sample(plain_pipeline, **arguments), expected)
    assert count_hooks(plain_pipeline.unet) == hooks
    sample(plain_pipeline)
    assert maps.num_calls == 2
    for layer in maps.layers.values():
        assert layer.shape == (2, 5, 8, 8)
        torch.testing.assert_close(layer.sum(dim=1), torch.ones(2, 8, 8))


@pytest.mark.parametrize("injection", ["cross_attention", "prompt"])
def test_maps_are_the_softmax_of_a_layer(plain_pipeline, injection):
    unet = plain_pipeline.unet
    attach_context_module(unet, make_context_module(tokens_per_concept=2), injection)
    calls = []
    attention = unet.get_submodule(LAYER)
    attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with collect_attention(unet) as maps:
        sample(plain_pipeline)
    expected = []
    with torch.no_grad():
        for (hidden,), kwargs in calls:
            context, keys = kwargs["encoder_hidden_states"], attention.to_k
            if injection == "cross_attention":
                context, keys = context[1][0].flatten(1, 2), attention.processor.to_k_ip[0]
            query, key = map(attention.head_to_batch_dim, (attention.to_q(hidden), keys(context)))
            shares = attention.get_attention_scores(query, key)[..., -10:]  # five nodes, two tokens each
            shares = shares.reshape(4, attention.heads, 64, 5, 2).sum(dim=4).mean(dim=1)
            expected.append(shares[2:].transpose(1, 2).reshape(2, 5, 8, 8))  # the prompt's half comes second
    assert len(expected) == maps.num_calls == 2
    torch.testing.assert_close(maps.layers[LAYER], torch.stack(expected).mean(dim=0))
    assert (maps.layers[LAYER].sum() < 2 * 64 - 1) == (injection == "prompt")  # there, the text has a share


def test_images_need_not_be_square(plain_pipeline):
    attach_random_module(plain_pipeline)
    with collect_attention(plain_pipeline.unet) as maps:
        sample(plain_pipeline, height=24, width=40)
    assert maps.mean().shape == (2, 5, 6, 10)
    assert maps.mean("up_blocks").ne(maps.mean()).any()


@pytest.mark.parametrize("injection", ["cross_attention", "prompt"])
def test_steps_at_scale_0_do_not_count(plain_pipeline, injection):
    attach_context_module(plain_pipeline.unet, make_context_module(), injection)
    cutoff = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with collect_attention(plain_pipeline.unet) as first:
        sample(plain_pipeline, callback_on_step_end=cutoff)
    with collect_attention(plain_pipeline.unet) as one_step:
        sample(plain_pipeline, num_inference_steps=1)
    assert first.num_calls == one_step.num_calls == 1
    torch.testing.assert_close(first.layers, one_step.layers)
    if injection == "cross_attention":
        torch.testing.assert_close(first.layers[LAYER].sum(dim=1), torch.ones(2, 8, 8))
    plain_pipeline.set_context_scale(0)
    with collect_attention(plain_pipeline.unet) as maps:
        sample(plain_pipeline)
    with pytest.raises(ValueError, match="at a scale above 0"):
        maps.mean()


def test_errors_say_what_is_missing(plain_pipeline):
    with pytest.raises(ValueError, match="no context adapter"), collect_attention(plain_pipeline.unet):
        pass
    attach_random_module(plain_pipeline)
    with collect_attention(plain_pipeline.unet) as maps:
        sample(plain_pipeline)
        with pytest.raises(ValueError, match="collect that of each call"):
            sample(plain_pipeline, height=48)
    with pytest.raises(ValueError, match="No layer's name begins with 'decoder'"):
        maps.mean("decoder")


def test_calls_without_tokens_are_passed_over(plain_pipeline):
    unet, photo = plain_pipeline.unet, Image.new("RGB", (32, 32), "red")
    features = {"posterior_encoder": "unet", "posterior_in_channels": 16, "posterior_feature_size": 8}
    attach_context_module(unet, make_context_module(**features))
    with collect_attention(unet) as maps:
        plain_pipeline.counterfactual(photo, ["snow"], num_inference_steps=2)
    torch.testing.assert_close(maps.layers[LAYER].sum(dim=1), torch.ones(1, 8, 8))
    with collect_attention(unet) as maps:
        sample(plain_pipeline, interventions={"snow": photo})
        with pytest.raises(ValueError, match="the pipeline passes no context tokens"):
            StableDiffusionPipeline(**plain_pipeline.components)("a circle")
    assert maps.num_calls == 2


def test_hues_of_quadrants_act_in_their_quadrants():
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    pipeline.set_progress_bar_config(disable=True)
    with collect_attention(pipeline.unet) as maps:
        sample(pipeline, num_inference_steps=6, interventions=["quad1"], guidance_scale=1.0)
    quadrants = maps.mean("up_blocks").mean(dim=0).unflatten(2, (2, 4)).unflatten(1, (2, 4)).mean(dim=(2, 4))
    nodes = pipeline.context_module.node_names
    places = {"quad1": (1, 0), "quad2": (1, 1), "quad3": (0, 0), "quad4": (0, 1)}  # row and column
    for name, place in places.items():
        own = quadrants[nodes.index(name)]
        assert own[place] == own.max() > 2 * (own.sum() - own.max()) / 3
