"""What ComposablePipeline adds to StableDiffusionPipeline."""

import inspect
import logging
import pydoc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_components, make_context_module, make_pipeline
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    schedulers,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig
from PIL import Image

from diffusers_ctx import ComposablePipeline, ComposableXLPipeline
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.context import Summand
from diffusers_ctx.pipelines import CompositionMixin, Conditioner
from diffusers_ctx.pipelines.guidance import adding_predictions
from diffusers_ctx.training.encoding.images import ImageTransform


PROMPT = "a picture of a circle"


@pytest.fixture
def pipeline(plain_pipeline) -> ComposablePipeline:
    return attach_random_module(plain_pipeline)


def sample(pipeline, prompt=PROMPT, seed=0, **arguments):
    defaults = {
        "num_inference_steps": 2,
        "output_type": "np",
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipeline(prompt, **(defaults | arguments))


OWN_DEFAULTS = {
    "interventions": None,
    "exogenous_noise": None,
    "context_guidance_scale": 1.0,
    "match_prompt": None,
    "add_scores": None,
}


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(ComposablePipeline, StableDiffusionPipeline), (ComposableXLPipeline, StableDiffusionXLPipeline)],
)
def test_the_signature_has_the_plain_pipelines_arguments_and_ours(kind, plain):
    stock = inspect.signature(plain.__call__).parameters
    ours = inspect.signature(kind.__call__).parameters
    assert list(ours) == [*list(stock)[:-1], *OWN_DEFAULTS, "kwargs"]
    for name, parameter in stock.items():
        assert ours[name] == parameter  # name, kind, default and annotation
    for name, default in OWN_DEFAULTS.items():
        assert ours[name].default == default and ours[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["match_prompt"].annotation == (bool | None)
    text = pydoc.render_doc(kind.__call__, renderer=pydoc.plaintext)
    assert "num_inference_steps: int = 50" in text and "match_prompt: bool | None = None" in text
    assert list(inspect.signature(kind.__init__).parameters) == list(inspect.signature(plain.__init__).parameters)


def test_subclasses_keep_their_own_call():
    class Loud(ComposablePipeline):
        def __call__(self, *args, **kwargs):
            return "loud"

    class Louder(Loud):
        pass

    class Quiet(ComposablePipeline):
        pass

    class Own(CompositionMixin, StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert Own._plain_class is StableDiffusionPipeline
    assert Louder.__call__ is Loud.__call__ and Quiet.__call__ is ComposablePipeline.__call__


def test_arguments_of_diffusers_may_be_positional(pipeline):
    generator = torch.Generator().manual_seed(0)
    got = pipeline(PROMPT, 32, 32, 2, None, None, 1.0, generator=generator, output_type="np", interventions=["snow"])
    np.testing.assert_array_equal(got.images, sample(pipeline, interventions=["snow"]).images)
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        pipeline(PROMPT, prompt=PROMPT)


@pytest.mark.parametrize(
    ("name", "near"), [("intervention", "interventions"), ("guidance", "guidance_scale"), ("kwargs", None)]
)
def test_a_misspelt_argument_is_refused(pipeline, name, near):
    expected = f"unexpected keyword argument `{name}`" + (f"; did you mean `{near}`[?]$" if near else "$")
    with pytest.raises(TypeError, match=expected):
        pipeline(PROMPT, **{name: ["snow"]})
    with pytest.raises(TypeError, match=expected):
        pipeline.sweep(PROMPT, [["snow"]], **{name: ["snow"]})
    pipeline.unload_context_adapter()
    with pytest.raises(TypeError, match=expected):
        pipeline(PROMPT, **{name: ["snow"]})


def test_what_diffusers_reads_from_its_kwargs_is_passed_on(pipeline):
    steps = []
    with pytest.warns(FutureWarning, match="callback"):
        sample(pipeline, callback=lambda step, timestep, latents: steps.append(step), callback_steps=1)
    assert steps == [0, 1]


def test_one_seed_gives_one_noise_under_every_intervention(pipeline):
    outputs = [sample(pipeline, interventions=names) for names in ([], ["snow"], ["snow", "fog"])]
    assert torch.equal(outputs[0].exogenous_noise, outputs[1].exogenous_noise)
    assert torch.equal(outputs[0].exogenous_noise, outputs[2].exogenous_noise)
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert np.abs(outputs[one].images - outputs[other].images).max() > 1e-3
    assert not torch.equal(outputs[0].exogenous_noise, sample(pipeline, seed=1).exogenous_noise)


def test_images_have_the_size_that_the_adapter_was_trained_on(plain_pipeline):
    attach_context_module(plain_pipeline.unet, make_context_module(posterior_sample_size=12))
    assert plain_pipeline._training_resolution == 24
    assert sample(plain_pipeline).images.shape == (1, 24, 24, 3)
    assert sample(plain_pipeline, height=40).images.shape == (1, 40, 24, 3)
    assert sample(plain_pipeline, latents=torch.zeros(1, 4, 10, 18)).images.shape == (1, 20, 36, 3)
    plain_pipeline.unload_context_adapter()
    assert sample(plain_pipeline).images.shape == (1, 32, 32, 3)


def test_exogenous_noise_goes_in_and_comes_out(pipeline):
    first = sample(pipeline, interventions=["snow"])
    again = sample(pipeline, interventions=["snow"], exogenous_noise=first.exogenous_noise)
    np.testing.assert_array_equal(first.images, again.images)
    other = sample(pipeline, interventions=["snow"], exogenous_noise=first.exogenous_noise + 1)
    assert np.abs(first.images - other.images).max() > 1e-3


@pytest.fixture
def told_pipeline() -> ComposablePipeline:
    """A pipeline whose context module knows what captions say."""
    pipeline = make_pipeline()
    attach_context_module(pipeline.unet, make_context_module(caption_dim=32))
    captions = pipeline.context_module.captions
    captions.standardize(Conditioner.of(pipeline).embed_captions([PROMPT, "a picture of a square", "snow"]))
    return pipeline


def test_noise_that_matches_the_prompt_is_that_of_candidates_chosen_by_it(told_pipeline):
    prompts, module = [PROMPT, "a picture of a square"], told_pipeline.context_module
    outputs = []
    for names in ([], ["snow"]):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        arguments = {"generator": generators, "match_prompt": True, "interventions": names}
        outputs.append(sample(told_pipeline, prompts, **arguments))
    assert torch.equal(outputs[0].exogenous_noise, outputs[1].exogenous_noise)
    embedded = told_pipeline.encode_prompt(prompts, "cpu", 1, False)[0].mean(dim=1)
    assert torch.equal(Conditioner.of(told_pipeline).embed_captions(prompts), embedded)
    for row, seed in enumerate((3, 4)):
        drawn = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)).item()
        numbers = torch.randn(1, 64, 5 * 4 + 1, generator=torch.Generator().manual_seed(drawn))[0]
        z = numbers[:, :-1].view(64, 5, 4)
        with torch.no_grad():
            values = module.concept_values(z, torch.zeros(64, 3))
            scores = module.captions(values[None], embedded[row : row + 1])[0]
        uniform = torch.distributions.Normal(0, 1).cdf(numbers[:, -1])
        gumbel = torch.distributions.Gumbel(0.0, 1.0).icdf(uniform)
        assert torch.equal(outputs[0].exogenous_noise[row], z[(scores + gumbel).argmax()])


def test_prompts_may_come_encoded_and_none_says_nothing(told_pipeline):
    embedded = told_pipeline.encode_prompt([PROMPT], "cpu", 1, False)[0]
    noise = [
        sample(told_pipeline, prompt, match_prompt=True, **arguments).exogenous_noise
        for prompt, arguments in ((PROMPT, {}), (None, {"prompt_embeds": embedded}))
    ]
    assert torch.equal(*noise)
    module = told_pipeline.context_module
    unsaid = sample(told_pipeline, "", match_prompt=True).exogenous_noise
    generator = torch.Generator().manual_seed(0)
    average = told_pipeline._prepare_exogenous_noise(1, generator, captions=module.captions.mean[None])
    assert torch.equal(unsaid, average) and not torch.equal(unsaid, noise[0])
    twice = sample(told_pipeline, match_prompt=True, num_images_per_prompt=2).exogenous_noise
    assert twice.shape == (2, 5, 4) and not torch.equal(twice[0], twice[1])


def test_a_prompt_cannot_be_matched_where_nothing_is_drawn_or_known(told_pipeline):
    noise = torch.zeros(1, 5, 4)
    with pytest.raises(ValueError, match="leave out one of them"):
        sample(told_pipeline, match_prompt=True, exogenous_noise=noise)
    told_pipeline.unload_context_adapter()
    with pytest.raises(ValueError, match="load_context_adapter"):
        sample(told_pipeline, match_prompt=True)


def test_adapters_that_do_not_know_captions_say_so(pipeline, told_pipeline):
    with torch.no_grad():
        told_pipeline.context_module.captions.embed_caption.weight.zero_()
    for unaware in (pipeline, told_pipeline):
        with pytest.raises(ValueError, match=r"without learning what captions say.*or leave out `match_prompt`"):
            sample(unaware, match_prompt=True)


def test_noise_matches_the_prompt_by_default_where_the_adapter_knows_captions(told_pipeline):
    embeds = told_pipeline.encode_prompt([PROMPT], "cpu", 1, False)[0]
    for prompt, arguments in ((PROMPT, {}), (None, {"prompt_embeds": embeds})):
        default, matched, drawn = (
            sample(told_pipeline, prompt, interventions=["snow"], **arguments, **options)
            for options in ({}, {"match_prompt": True}, {"match_prompt": False})
        )
        np.testing.assert_array_equal(default.images, matched.images)
        assert not torch.equal(default.exogenous_noise, drawn.exogenous_noise)
        expected = told_pipeline._prepare_exogenous_noise(1, torch.Generator().manual_seed(0))
        assert torch.equal(drawn.exogenous_noise, expected)
    given = sample(told_pipeline, exogenous_noise=expected)
    assert torch.equal(given.exogenous_noise, expected)


@pytest.mark.parametrize("kind", ["no captions", "nothing learned"])
def test_by_default_noise_matches_nothing_where_captions_say_nothing(pipeline, told_pipeline, kind):
    if kind == "nothing learned":
        pipeline = told_pipeline
        with torch.no_grad():
            pipeline.context_module.captions.embed_caption.weight.zero_()
    np.testing.assert_array_equal(sample(pipeline).images, sample(pipeline, match_prompt=False).images)


def test_fused_text_encoders_ask_for_a_choice(told_pipeline):
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    told_pipeline.text_encoder.add_adapter(config, "style")
    sample(told_pipeline)
    told_pipeline.fuse_lora(components=["text_encoder"])
    with pytest.raises(ValueError, match=r"unfuse_lora\(\)"):
        sample(told_pipeline)
    sample(told_pipeline, match_prompt=False)


def test_the_generator_gives_the_plain_pipelines_latents(pipeline):
    used, untouched = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    pipeline._prepare_exogenous_noise(2, used)
    assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=untouched))
    noise = pipeline._prepare_exogenous_noise(1, torch.Generator().manual_seed(5))
    latents = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    assert (noise - latents).abs().min() > 1e-6  # not the diffusion noise over again


def test_without_a_generator_every_call_has_noise_of_its_own(pipeline):
    torch.manual_seed(0)
    outputs = [sample(pipeline, generator=None) for _ in range(2)]
    assert not torch.equal(outputs[0].exogenous_noise, outputs[1].exogenous_noise)
    torch.manual_seed(0)
    assert torch.equal(sample(pipeline, generator=None).exogenous_noise, outputs[0].exogenous_noise)
    noises = [pipeline._prepare_exogenous_noise(1) for _ in range(2)]
    assert not torch.equal(noises[0], noises[1])


def test_every_image_of_a_prompt_has_noise_of_its_own(pipeline):
    output = sample(pipeline, ["a picture of a circle", "a picture of a square"], num_images_per_prompt=2)
    assert output.exogenous_noise.shape == (4, *pipeline.context_module.noise_shape)
    for one in range(4):
        for other in range(one):
            assert not torch.equal(output.exogenous_noise[one], output.exogenous_noise[other])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_interventions_per_prompt_equal_one_call_each(pipeline, guidance_scale):
    prompts = ["a picture of a circle", "a picture of a square"]
    contexts = [["night"], {"fog": 0.5}]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    together = sample(
        pipeline, prompts, interventions=contexts, generator=generators(), guidance_scale=guidance_scale
    ).images
    for row in range(2):
        alone = sample(
            pipeline,
            prompts[row],
            interventions=contexts[row],
            generator=[generators()[row]],
            guidance_scale=guidance_scale,
        ).images
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_strengths_lead_from_observational_to_intervened(pipeline):
    images = [sample(pipeline, interventions={"snow": strength}).images for strength in (0.0, 0.5, 1.0)]
    np.testing.assert_array_equal(images[0], sample(pipeline).images)
    np.testing.assert_array_equal(images[2], sample(pipeline, interventions=["snow"]).images)
    # half the strength is the mean of the two mechanisms, and half the edges into the concept
    module, observational = pipeline.context_module, torch.zeros(1, 3)
    noise = pipeline._prepare_exogenous_noise(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        u = [module.mechanism(noise, mask) for mask in (observational, torch.tensor([[0.0, 1, 0]]))]
        e = u[0].clone()
        e[:, 1] = (u[0][:, 1] + u[1][:, 1]) / 2
        edges = module.causal.blocks * module.causal.allowed[:, :, None, None]
        edges[1] /= 2
        size = e[0].numel()
        values = torch.linalg.solve(torch.eye(size) - edges.transpose(1, 2).reshape(size, size), e.flatten())
        tokens = module.read_out(values.view_as(e))
    stock = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = sample(stock, ip_adapter_image_embeds=[tokens]).images
    np.testing.assert_allclose(images[1], expected, atol=1e-5)
    for one, other in ((0, 1), (1, 2)):
        assert np.abs(images[one] - images[other]).max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("context_scale", [0.0, 2.5])
def test_context_guidance_adds_the_contrast(pipeline, guidance_scale, context_scale):
    """Against one denoising step computed by hand from separate UNet evaluations."""
    generator = torch.Generator().manual_seed(0)
    noise = pipeline._prepare_exogenous_noise(1, generator)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text, empty = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    module = pipeline.context_module
    tokens = {
        name: module(noise, mask) for name, mask in (("do", torch.tensor([[0.0, 1, 0]])), ("obs", torch.zeros(1, 3)))
    }
    pipeline.scheduler.set_timesteps(1)
    t = pipeline.scheduler.timesteps[0]

    def predict(embeds, context):
        with torch.no_grad():
            kwargs = {"added_cond_kwargs": {"image_embeds": [tokens[context]]}}
            return pipeline.unet(latents, t, encoder_hidden_states=embeds, **kwargs).sample

    conditional = predict(text, "do")
    prediction = conditional
    if guidance_scale > 1:
        unconditional = predict(empty, "do")
        prediction = unconditional + guidance_scale * (conditional - unconditional)
    prediction = prediction + (context_scale - 1) * (conditional - predict(text, "obs"))
    expected = pipeline.scheduler.step(prediction, t, latents).prev_sample
    got = sample(
        pipeline,
        interventions=["snow"],
        latents=latents,
        exogenous_noise=noise,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
        context_guidance_scale=context_scale,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not pipeline.unet._forward_hooks


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("context_scale", [1.0, 2.5])
def test_added_scores_are_the_sum_of_what_each_intervention_changes(pipeline, guidance_scale, context_scale):
    """Against one denoising step computed by hand, where nothing causes anything; a row has two, one or none."""
    module = pipeline.context_module
    torch.nn.init.zeros_(module.causal.blocks)
    generator = torch.Generator().manual_seed(0)
    noise, latents = torch.randn(3, *module.noise_shape, generator=generator), torch.randn(3, 4, 16, 16)
    text, empty = pipeline.encode_prompt([PROMPT] * 3, "cpu", 1, True)
    pipeline.scheduler.set_timesteps(1)
    t = pipeline.scheduler.timesteps[0]
    fog, snow = torch.eye(3)[[2]], torch.eye(3)[[1]]

    def predict(embeds, row, mask):
        kwargs = {"added_cond_kwargs": {"image_embeds": [module(noise[[row]], mask)]}}
        return pipeline.unet(latents[[row]], t, encoder_hidden_states=embeds[[row]], **kwargs).sample

    expected = []
    with torch.no_grad():
        for row, masks in enumerate(([fog, snow], [snow], [])):
            plain = predict(text, row, torch.zeros(1, 3))
            changes = sum((predict(text, row, mask) - plain for mask in masks), torch.zeros_like(plain))
            prediction = plain + context_scale * changes
            if guidance_scale > 1:
                told = torch.zeros(1, 3)  # in a batch with two interventions, every row starts from those it lacks
                apart = predict(text, row, told) - predict(empty, row, told)
                prediction = prediction + (guidance_scale - 1) * apart
            expected.append(pipeline.scheduler.step(prediction, t, latents[[row]]).prev_sample)
    got = sample(
        pipeline,
        [PROMPT] * 3,
        interventions=[["fog", "snow"], ["snow"], []],
        latents=latents,
        exogenous_noise=noise,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
        context_guidance_scale=context_scale,
        add_scores=True,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert not pipeline.unet._forward_hooks


def test_scores_are_added_where_there_is_no_noise(pipeline):
    module = pipeline.context_module

    def draw(**options):
        return sample(pipeline, interventions=["fog", "snow"], **options).images

    for without in ([], module.node_names):
        module.leave_out_noise(without)
        added, apart = draw(add_scores=True), draw(add_scores=False)
        assert np.abs(added - apart).max() > 1e-4
        np.testing.assert_array_equal(draw(), added if without else apart)
    np.testing.assert_array_equal(*(sample(pipeline, interventions=["fog"], add_scores=a).images for a in (0, 1)))


def test_context_guidance_keeps_the_other_conditions_of_the_unet(pipeline):
    """SDXL's UNet takes the size and a pooled text beside the tokens; both halves get the contrast at the prompt."""
    config = dict(pipeline.unet.config) | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    }
    pipeline.unet = UNet2DConditionModel.from_config(config).eval()
    attach_random_module(pipeline)
    generator = torch.Generator().manual_seed(0)
    module = pipeline.context_module
    noise, mask = torch.randn(2, *module.noise_shape, generator=generator), torch.tensor([[0.0, 1, 0], [1, 0, 0]])
    shapes = {"latents": (4, 4, 16, 16), "text": (4, 5, 32), "pooled": (4, 8), "sizes": (4, 6)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def predict(tokens, rows):
        conditions = {"text_embeds": given["pooled"][rows], "time_ids": given["sizes"][rows], "image_embeds": [tokens]}
        text = given["text"][rows]
        return pipeline.unet(
            given["latents"][rows], 10, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False
        )[0]

    with torch.no_grad():
        intervened, observational = module(noise, mask), module(noise, torch.zeros_like(mask))
        plain = predict(torch.cat([intervened] * 2), slice(None))
        contrast = predict(intervened, slice(2, None)) - predict(observational, slice(2, None))
        first, other = Summand(torch.full((2,), 3.0), intervened), Summand(torch.full((2,), -2.0), observational)
        with adding_predictions(pipeline.unet, first, [other]):
            guided = predict(torch.cat([intervened] * 2), slice(None))
    torch.testing.assert_close(guided, plain + 2.0 * contrast.repeat(2, 1, 1, 1))


def test_context_guidance_outlives_classifier_free_guidance(pipeline):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "callback_on_step_end": cutoff}
    images = [
        sample(pipeline, interventions=["snow"], context_guidance_scale=scale, **arguments).images
        for scale in (1.0, 2.0)
    ]
    assert images[0].shape == images[1].shape == (1, 32, 32, 3)
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_without_an_adapter_it_is_the_plain_pipeline(plain_pipeline):
    stock = StableDiffusionPipeline(**plain_pipeline.components, requires_safety_checker=False)
    output = sample(plain_pipeline)
    np.testing.assert_array_equal(output.images, sample(stock).images)
    assert output.exogenous_noise is None


def test_flags_of_the_safety_checker_are_passed_on(pipeline, monkeypatch):
    assert sample(pipeline).nsfw_content_detected is None
    monkeypatch.setattr(pipeline, "run_safety_checker", lambda image, device, dtype: (image, [True]))
    assert sample(pipeline).nsfw_content_detected == [True]


def test_a_counterfactual_without_change_gives_the_image_back(pipeline):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ceiling = pipeline.vae.decode(pipeline.vae.encode(2 * image - 1).latent_dist.mode()).sample.detach()
    for context in ([], ["snow"]):
        output = pipeline.counterfactual(image, context, context, num_inference_steps=20, output_type="pt")
        error = (output.images - (ceiling / 2 + 0.5).clamp(0, 1)).abs().max()
        assert error < 1e-3


def test_a_counterfactual_changes_with_the_intervention_alone(pipeline):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    factual = pipeline.counterfactual(image, [], num_inference_steps=5, output_type="pt")
    changed = pipeline.counterfactual(image, ["snow"], num_inference_steps=5, output_type="pt")
    assert torch.equal(factual.exogenous_noise, changed.exogenous_noise)
    torch.testing.assert_close(factual.exogenous_noise, pipeline.infer_exogenous_noise(image))
    assert (factual.images - changed.images).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("prediction_type", "dtype"),
    [("v_prediction", torch.float32), ("epsilon", torch.float32), ("v_prediction", torch.bfloat16)],
)
def test_a_counterfactual_inverts_every_kind_of_model(prediction_type, dtype):
    components = make_components(prediction_type=prediction_type)
    pipeline = attach_random_module(ComposablePipeline(**components, requires_safety_checker=False))
    pipeline.unet.conv_out.weight.data *= 0.05
    pipeline.to(dtype)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = pipeline.vae.encode((2 * image - 1).to(dtype)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    back = pipeline.counterfactual(image, num_inference_steps=50, output_type="latent").images
    assert back.dtype == dtype
    assert (back - latents).abs().max() < 0.01 * latents.abs().max()


def test_a_counterfactual_takes_an_autoencoder_without_a_posterior(pipeline):
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    images = pipeline.counterfactual(torch.rand(1, 3, 32, 32), num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_a_counterfactual_depends_on_the_noise_schedule_and_not_on_the_sampler(pipeline, name):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = pipeline.counterfactual(image, ["snow"], num_inference_steps=4, output_type="pt").images
    pipeline.scheduler = getattr(schedulers, name).from_config(pipeline.scheduler.config)
    got = pipeline.counterfactual(image, ["snow"], num_inference_steps=4, output_type="pt").images
    assert torch.equal(got, expected)


def test_pictures_arrays_and_tensors_are_taken(pipeline):
    array = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    array = np.rint(array * 255) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    picture = pipeline.image_processor.numpy_to_pil(array)
    integers = [np.rint(array * 255).astype(np.uint8), (tensor * 255).round().to(torch.uint8)]
    integers += [list(integers[0]), integers[1].long()]
    noises = [pipeline.infer_exogenous_noise(image) for image in (array, tensor, picture, picture[0], *integers)]
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], atol=1e-4, rtol=1e-4)


def test_photos_of_any_size_and_mode_are_seen_as_training_sees_them(pipeline):
    side = pipeline.context_module.config.posterior_sample_size * pipeline.vae_scale_factor
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    photo = Image.fromarray(pixels)
    trained_on = ImageTransform(side, center_crop=True, seed=0)(photo, 0)
    torch.testing.assert_close(
        pipeline.infer_exogenous_noise(photo), pipeline.infer_exogenous_noise(trained_on[None] / 2 + 0.5)
    )
    assert pipeline.counterfactual(photo, ["snow"], num_inference_steps=1).images[0].size == (side, side)
    turned = photo.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # the camera was held upright: seen as it is, the picture lies on its side
    torch.testing.assert_close(pipeline.infer_exogenous_noise(turned), pipeline.infer_exogenous_noise(photo))
    for mode in ("L", "P", "CMYK"):
        assert pipeline.infer_exogenous_noise([photo.convert("RGB").convert(mode)]).isfinite().all()


def test_custom_pipeline_from_the_folder(plain_pipeline, tmp_path):
    plain_pipeline.save_pretrained(tmp_path)
    folder = Path(inspect.getfile(ComposablePipeline)).parent
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path), custom_pipeline=str(folder), trust_remote_code=True)
    assert type(loaded).__name__ == "ComposablePipeline" and hasattr(loaded, "load_context_adapter")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(sample(loaded).images, sample(plain_pipeline).images, atol=1e-5)


def test_half_precision_follows_the_unet(pipeline):
    pipeline.to(torch.bfloat16)
    assert pipeline.context_module.dtype == torch.bfloat16
    images = sample(pipeline, interventions=["snow"], context_guidance_scale=2.0).images
    assert np.isfinite(images).all()
    image = torch.rand(1, 3, 32, 32)
    assert pipeline.counterfactual(image, ["snow"], num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interventions": ["rain"]}, "rain.*night"),
        ({"interventions": {"snow": 2.0}}, r"\[0, 1\]"),
        ({"interventions": [["snow"], ["fog"]]}, "2 entries for 1 prompts"),
        ({"exogenous_noise": torch.zeros(1, 2, 3)}, r"need \(1, 5, 4\)"),
        ({"exogenous_noise": np.zeros((1, 5, 4))}, r"numpy.ndarray.*pass a `torch.Tensor` of shape \(1, 5, 4\)"),
        ({"interventions": ["obs"]}, r"write \[\] or None"),
        ({"ip_adapter_image_embeds": [torch.zeros(1, 1, 32)]}, "IP-Adapter"),
        ({"generator": [torch.Generator() for _ in range(3)]}, "3 entries for 1 images"),
    ],
)
def test_mistakes_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline, **arguments)
    sample(pipeline)


def test_a_counterfactual_takes_one_prompt_or_one_each(pipeline):
    with pytest.raises(ValueError, match="3 entries for 2 images"):
        pipeline.counterfactual(torch.zeros(2, 3, 32, 32), prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="`generator` has 1 entries for 2 images"):
        pipeline.counterfactual(torch.zeros(2, 3, 32, 32), generator=[torch.Generator()])
    with pytest.raises(ValueError, match="`negative_prompt` has 1 entries for 2 images"):
        pipeline.counterfactual(torch.zeros(2, 3, 32, 32), guidance_scale=2.0, negative_prompt=["a"])


def test_guidance_inverts_and_generates_alike(pipeline):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = pipeline._encode_images(2 * image - 1)

    def change(*contexts, **options):
        arguments = {"prompt": PROMPT, "num_inference_steps": 20, "output_type": "latent"} | options
        return (pipeline.counterfactual(image, *contexts, **arguments).images - latents).norm() / latents.norm()

    guided = {"guidance_scale": 4.0, "negative_prompt": "a square"}
    assert change(["snow"], ["snow"], **guided) < 0.01 < change(["fog"], ["snow"], **guided)


def test_guidance_of_a_counterfactual_is_the_formula(pipeline):
    """One step of generation, with the diffusion noise that inversion has found."""
    tokens = torch.randn(1, *pipeline.context_module.tokens_shape, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    conditioner = Conditioner.of(pipeline)

    def conditions(*texts):
        geometry = conditioner.full_image_geometry(x).repeat(len(texts), 1)
        return conditioner.model_kwargs(conditioner.encode_captions(list(texts)), geometry)

    with torch.no_grad():
        guided = pipeline._guided_model(conditions("a square", PROMPT), tokens, 3.0)(x, 10)
        unconditional, conditional = (
            pipeline._guided_model(conditions(text), tokens, 1.0)(x, 10) for text in ("a square", PROMPT)
        )
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-5, rtol=1e-4)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_a_generator_draws_counterfactuals_from_the_posterior(pipeline):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)

    def predict(generator, names=("snow",)):
        options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
        return pipeline.counterfactual(image, list(names), ["fog"], **options)

    def each():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    drawn, mean = predict(each()), predict(None)
    pixels = pipeline._preprocess(image)
    with torch.no_grad():
        mask = torch.tensor([[0.0, 0, 1]] * 2)
        posterior = pipeline.context_module.posterior(pipeline._encode_images(pixels), mask)
    eps = torch.cat([torch.randn(1, 5, 4, generator=generator) for generator in each()])
    torch.testing.assert_close(drawn.exogenous_noise, posterior.at(eps), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean.exogenous_noise, posterior.mean, atol=1e-5, rtol=1e-4)
    assert torch.equal(drawn.images, predict(each()).images)
    assert not torch.equal(drawn.images[0], drawn.images[1])
    one = torch.Generator().manual_seed(3)
    assert not torch.equal(predict(one).images, predict(one).images)  # as for images, it is advanced


def test_a_drawn_counterfactual_without_change_gives_the_image_back(pipeline):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 20, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    back = pipeline.counterfactual(image, ["snow"], ["snow"], **options).images
    torch.testing.assert_close(back, pipeline._encode_images(2 * image - 1), atol=1e-2, rtol=1e-2)


def test_callbacks_of_a_counterfactual_see_and_change_its_steps(pipeline):
    image, seen = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe, step, timestep, tensors["latents"].clone()))
        return {}

    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline.counterfactual(image, ["snow"], **arguments).images
    watched = pipeline.counterfactual(image, ["snow"], callback_on_step_end=watch, **arguments).images
    assert torch.equal(plain, watched) and torch.equal(seen[-1][3], plain)
    assert [entry[:3] for entry in seen] == [(pipeline, 0, 999), (pipeline, 1, 666), (pipeline, 2, 333)]
    zeros = pipeline.counterfactual(
        image, callback_on_step_end=lambda *given: {"latents": torch.zeros_like(given[3]["latents"])}, **arguments
    )
    assert not zeros.images.any()
    with pytest.raises(ValueError, match=r"given `latents`, and no \['prompt_embeds'\]"):
        pipeline.counterfactual(image, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_counterfactual_takes_a_step_at_least(pipeline):
    with pytest.raises(ValueError, match="`num_inference_steps` is 0; it must be 1 or more"):
        pipeline.counterfactual(torch.zeros(1, 3, 32, 32), num_inference_steps=0)


@pytest.mark.parametrize("scale", [-1, float("nan")])
def test_context_is_not_weighed_below_zero(pipeline, scale):
    before = sample(pipeline, interventions=["snow"]).images
    with pytest.raises(ValueError, match="it must be 0 or more"):
        pipeline.set_context_scale(scale)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]).images, before)


def test_other_warnings_of_transformers_are_heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.warning(
        "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`"
    )
    logger.warning("`Foo` requires torchvision")
    assert set(caplog.messages) == {"`Foo` requires torchvision"}
