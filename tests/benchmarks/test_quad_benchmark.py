"""The benchmark's methods: what they are given, and that the oracle has quad's own mechanisms."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from measure import REAL_B_SEED, REAL_SEED, measure_combination, measure_graph, measure_kernel_distance
from methods.ablations import Oracle, UnconditionalModule, given_noise, oracle_graph, set_mechanisms
from methods.baselines import ComposableDiffusion, ConceptSliders, LoraDifference, LoraPerContext, PromptLora
from methods.baselines.lora import LoraTraining, load_base, plain_sampler
from methods.baselines.prompt_lora import load_prompt_lora, name_concepts
from methods.context_adapter import learning_code_fingerprint, load_pipeline
from methods.given_noise import GivenNoiseModule, LabelsOnly
from methods.light_vae import FIRST_WEIGHT, LAST_WEIGHT, LightVae, likelihood_weight
from methods.predicting import draw
from methods.quad_setting import QuadSetting
from methods.setting import in_batches
from PIL import Image
from safetensors.torch import load_file
from tables import summarize_method
from torch.utils.tensorboard import SummaryWriter
from training_logs import write_log

import diffusers_ctx
from diffusers_ctx import embedded_base
from diffusers_ctx.context import intervention_mask
from diffusers_ctx.data import load_context_dataset, quad
from diffusers_ctx.evaluation import kernel_distance
from diffusers_ctx.evaluation.features import latent_features
from diffusers_ctx.training.config import ContextConfig


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> QuadSetting:
    return QuadSetting(
        dependent=True,
        seed=7,
        images_per_context=12,
        train_steps=2,
        concept_steps=4,
        baseline_steps=3,
        num_inference_steps=2,
        train_batch_size=8,
        work_dir=tmp_path_factory.mktemp("benchmark"),
    )


@pytest.fixture(scope="module")
def prompt_lora(setting, tmp_path_factory) -> Path:
    """The folder of a LoRA that prompts name contexts to."""
    folder = tmp_path_factory.mktemp("methods") / "prompt-lora"
    PromptLora().train(setting, folder)
    return folder


@pytest.fixture(scope="module")
def lora_per_context(setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "lora-per-context"
    LoraPerContext().train(replace(setting, baseline_steps=7), folder)  # one for each
    return folder


def make_module(module_class):
    edges = [tuple(edge.split("->")) for edge in oracle_graph(True)]
    return module_class(quad.CONCEPTS, token_dim=8, num_hidden_factors=2, noise_dim=1, concept_dim=1, graph=edges)


@pytest.mark.parametrize("interventions", [(), ("quad1",), ("quad3", "size"), ("quad1", "quad2", "orientation")])
def test_the_oracle_has_the_simulators_own_mechanisms(setting, interventions):
    module = make_module(GivenNoiseModule)
    set_mechanisms(module, setting)
    sample = quad.generate(interventions, n=50, seed=3)
    nodes = [quad.FACTORS.index(name) for name in (*quad.CONCEPTS, "color", "shape")]
    noise = torch.tensor(sample.noise[:, nodes], dtype=torch.float32)
    with torch.no_grad():
        values = module.concept_values(noise[..., None], intervention_mask(list(interventions), quad.CONCEPTS, 50))
    np.testing.assert_allclose(values[..., 0].numpy(), sample.factors[:, nodes], atol=1e-4)


def test_the_oracles_noise_is_that_of_the_images(setting):
    dataset = load_context_dataset(setting.data_dir, concepts=list(quad.CONCEPTS))
    noise = setting.true_noise(list(dataset["context"])).numpy()
    for row in range(0, len(dataset), 5):
        interventions = quad.contexts()[dataset[row]["context"]]
        # the noise of an image, put through the simulator again, gives the image
        sample = quad._sample(noise[row : row + 1].astype(float), interventions, True)
        difference = np.abs(
            sample.images[0].astype(int) - np.asarray(dataset[row]["image"].convert("RGB")).astype(int)
        )
        assert difference.mean() < 0.5
    assert given_noise(setting, list(dataset["context"])).shape == (len(dataset), 8)


def test_the_oracles_posterior_is_the_noise_that_it_reads():
    module = make_module(GivenNoiseModule)
    noise, eps = torch.randn(2, 3, *module.noise_shape)
    assert torch.equal(module.posterior(noise, torch.zeros(3, 6)).at(eps), noise)


@pytest.mark.parametrize("method", [Oracle, LabelsOnly])
def test_ablations_read_the_noise_of_their_images(setting, method, tmp_path):
    context = ContextConfig(num_hidden_factors=2, graph=list(oracle_graph(True)), posterior_encoder="vae")
    latents = method(context=context).encode(setting, None)
    rows = torch.tensor([40, 3])
    read = latents.mean_batch(rows).posterior_input
    expected = given_noise(setting, latents.contexts)[rows, :, None]
    assert torch.equal(read, expected if method is Oracle else torch.zeros_like(expected))


def test_the_oracle_trains_and_keeps_its_mechanisms(setting, tmp_path):
    context = ContextConfig(num_hidden_factors=2, graph=list(oracle_graph(True)), posterior_encoder="vae")
    Oracle(context=context).train(setting, tmp_path)
    trained, expected = load_pipeline(tmp_path, setting.base).context_module, make_module(GivenNoiseModule)
    set_mechanisms(expected, setting)
    torch.testing.assert_close(trained.causal.blocks, expected.causal.blocks)
    torch.testing.assert_close(trained.mechanism.weight_do, expected.mechanism.weight_do)
    assert trained.read_out.norm.weight.isfinite().all()


def test_an_unconditional_posterior_does_not_depend_on_the_context():
    module = UnconditionalModule(quad.CONCEPTS, token_dim=8, posterior_type="amortized")
    latents, mask = torch.randn(2, 4, 8, 8), intervention_mask(["quad1"], quad.CONCEPTS, 2)
    assert torch.equal(module.posterior(latents, mask).mean, module.posterior(latents, 0 * mask).mean)


def test_prompts_name_the_context_and_batches_have_the_asked_contexts_alone(setting, tmp_path):
    training = LoraTraining(load_base(setting), setting, log_dir=tmp_path, name="names")
    rows = next(training.batches(["obs", "size"]))
    contexts = [training.latents.contexts[row] for row in rows]
    assert contexts.count("obs") == contexts.count("size") == len(rows) / 2
    prompts = PromptLora().prompts(setting.bed, training, rows)
    assert all(prompt.endswith(", k") == (context == "size") for prompt, context in zip(prompts, contexts))
    assert name_concepts(setting.bed, "a circle", ["quad1", "quad2"]) == "a circle, b, d"


def test_scores_that_are_added_are_those_of_the_lora(setting, prompt_lora):
    captions = ["a picture of a circle"] * 3
    alone = PromptLora().load(setting, prompt_lora)
    method = ComposableDiffusion("prompt-lora", PromptLora())
    composed = method.load(setting, prompt_lora.parent / "composable")
    assert np.array_equal(alone(captions, ["quad1"], 0), composed(captions, ["quad1"], 0))
    # with one concept, the loop samples as the LoRA does
    pipeline, predictor = PromptLora().load_predictor(setting, prompt_lora)
    loop = in_batches(lambda batch, noise: draw(pipeline, predictor, setting, batch, ["quad1"], noise), captions, 0)
    summed, plain = loop.astype(int), alone(captions, [], 0).astype(int)
    expected = alone(captions, ["quad1"], 0).astype(int)
    assert np.abs(summed - expected).max() <= 1 < np.abs(plain - expected).max()


def test_the_changes_of_two_concepts_are_added(setting, prompt_lora):
    """Recomputed one prompt at a time, with the rotation that DDIM is."""
    captions, names = ["a picture of a circle", "a picture of a square"], ("quad1", "size")
    composed = ComposableDiffusion("prompt-lora", PromptLora()).load(setting, prompt_lora.parent / "composable")(
        captions, names, 0
    )

    pipeline = load_prompt_lora(setting, prompt_lora)
    scheduler = pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(setting.num_inference_steps)
    alphas, times = scheduler.alphas_cumprod.double(), [*scheduler.timesteps.tolist(), None]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert latents.shape[-1] == pipeline.unet.config.sample_size

    @torch.no_grad()
    def velocity(row: int, time: int, interventions: tuple[str, ...]) -> torch.Tensor:
        prompt = name_concepts(setting.bed, captions[row], interventions)
        text, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        return pipeline.unet(latents[row : row + 1], time, text).sample[0]

    def changes_of(names: tuple[str, ...], time: int) -> torch.Tensor:
        plain = torch.stack([velocity(row, time, ()) for row in range(2)])
        changes = [torch.stack([velocity(row, time, (name,)) for row in range(2)]) - plain for name in names]
        return plain + torch.stack(changes).sum(dim=0)

    for only in (("quad1",), ("size",), names):  # the last one is what is compared; each alone must differ from it
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for time, following in itertools.pairwise(times):
            v = changes_of(only, time)
            alpha = alphas[time]
            signal = alpha.sqrt() * latents - (1 - alpha).sqrt() * v
            noise = alpha.sqrt() * v + (1 - alpha).sqrt() * latents
            alpha = scheduler.final_alpha_cumprod.double() if following is None else alphas[following]
            latents = (alpha.sqrt() * signal + (1 - alpha).sqrt() * noise).float()
        with torch.no_grad():
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        final = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
        difference = np.abs(final - composed).max()
        assert difference <= 1 if only == names else difference > 1, only


def add_by_hand(pipeline, folder: Path, weight: float = 1.0) -> None:
    """Adds a LoRA of the UNet, whose rank is its scale, to the weights themselves."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    for name in (key for key in weights if key.endswith(".lora_A.weight")):
        layer = pipeline.unet.get_submodule(name.removeprefix("unet.").removesuffix(".lora_A.weight"))
        down, up = weights[name], weights[name.replace("lora_A", "lora_B")]
        getattr(layer, "base_layer", layer).weight.data += weight * up @ down


def test_loras_of_several_contexts_are_added(setting, lora_per_context):
    composed = LoraPerContext().load(setting, lora_per_context)
    captions = ["a picture of a circle"] * 3
    got = {names: composed(captions, names, 0).astype(int) for names in ((), ("quad4",), ("quad4", "size"))}
    pipeline = load_base(setting)
    for name in ("quad4", "size"):
        add_by_hand(pipeline, lora_per_context / name)
    expected = plain_sampler(pipeline, setting, lambda caption, _: caption)(captions, [], 0).astype(int)
    assert np.abs(got.pop(("quad4", "size")) - expected).max() <= 1
    assert min(np.abs(other - expected).max() for other in got.values()) > 1


def test_what_loras_share_is_subtracted(setting, lora_per_context):
    composed = LoraDifference("lora-per-context").load(setting, lora_per_context.parent / "lora-difference")
    captions = ["a picture of a circle"] * 3
    pipeline = load_base(setting)
    for name, sign in {"quad4": 1, "size": 1, "obs": -1}.items():
        add_by_hand(pipeline, lora_per_context / name, sign)
    expected = plain_sampler(pipeline, setting, lambda caption, _: caption)(captions, [], 0).astype(int)
    assert np.abs(composed(captions, ("quad4", "size"), 0) - expected).max() <= 1
    alone = LoraPerContext().load(setting, lora_per_context)
    for names in ((), ("quad4",)):
        assert np.array_equal(composed(captions, names, 0), alone(captions, names, 0))
    assert np.abs(alone(captions, ("quad4", "size"), 0) - expected).max() > 1


@pytest.mark.parametrize("method", [LoraPerContext(), LabelsOnly(context=ContextConfig(posterior_encoder="vae"))])
def test_predictions_that_can_be_added_are_those_that_the_method_samples_with(
    setting, lora_per_context, tmp_path, method
):
    folder = lora_per_context if isinstance(method, LoraPerContext) else tmp_path
    if folder is tmp_path:
        method.train(setting, folder)
    captions = ["a picture of a circle"] * 3
    pipeline, predictor = method.load_predictor(setting, folder)
    drawn = {}
    for scale in (1.0, 3.0):
        at = replace(setting, guidance_scale=scale)
        drawn[scale] = method.load(at, folder)(captions, ["size"], 0).astype(int)
        summed = in_batches(
            lambda batch, noise, at=at: draw(pipeline, predictor, at, batch, ["size"], noise), captions, 0
        )
        assert np.abs(summed - drawn[scale]).max() <= 1
    assert np.abs(drawn[1.0] - drawn[3.0]).max() > 1
    latents, timestep = torch.randn(3, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        plain, changed = (predictor(captions, names)(latents, timestep) for names in ([], ["size"]))
    assert (plain - changed).abs().max() > 1e-4


def test_directions_of_concepts_are_added_to_the_lora_that_names_them(setting, prompt_lora):
    setting, folder = replace(setting, baseline_steps=6), prompt_lora.parent / "sliders"  # a step for each
    method = ConceptSliders("prompt-lora")
    method.train(setting, folder)
    composed = method.load(setting, folder)
    captions = ["a picture of a circle"] * 3
    pipeline = load_prompt_lora(setting, prompt_lora)
    plain = plain_sampler(pipeline, setting, lambda caption, _: caption)
    before = plain(captions, [], 0).astype(int)
    for name in ("quad4", "size"):
        add_by_hand(pipeline, folder / name)
    expected = plain(captions, [], 0).astype(int)
    assert np.abs(composed(captions, ["quad4", "size"], 0) - expected).max() <= 1 < np.abs(before - expected).max()
    assert np.abs(composed(captions, [], 0) - before).max() <= 1


def test_composing_without_the_lora_says_what_to_run(setting, tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the method 'prompt-lora' first"):
        ComposableDiffusion("prompt-lora", PromptLora()).train(setting, tmp_path / "composable")


def test_a_log_has_every_tenth_step_and_the_last_one_as_a_resumed_run_told_them_last(tmp_path):
    for start, loss in ((0, 1.0), (20, 2.0)):  # stopped after step 33, and gone on from a checkpoint at step 20
        with SummaryWriter(tmp_path / "logs", filename_suffix=str(start)) as log:
            for step in range(start + 1, start + 34):
                log.add_scalar("loss", loss, step)
    write_log(tmp_path, tmp_path / "row.csv")
    heading, *lines = (tmp_path / "row.csv").read_text().splitlines()
    assert heading == "metric,step,value"
    assert lines == ["loss,10,1", "loss,20,1", "loss,30,2", "loss,40,2", "loss,50,2", "loss,53,2"]


def test_what_has_no_training_has_no_log(tmp_path):
    write_log(tmp_path, tmp_path / "row.csv")
    write_log(tmp_path / "not-there", tmp_path / "row.csv")
    assert not list(tmp_path.iterdir())


def test_the_weight_of_the_likelihood_grows_by_the_same_factor_until_half_of_the_training():
    weights = [likelihood_weight(progress) for progress in (0, 0.125, 0.25, 0.5, 0.75, 1)]
    quarter = (LAST_WEIGHT / FIRST_WEIGHT) ** 0.25
    middle = [FIRST_WEIGHT * quarter, FIRST_WEIGHT * quarter**2]
    assert weights == pytest.approx([FIRST_WEIGHT, *middle, *[LAST_WEIGHT] * 3])


def test_a_light_vae_trains_as_long_as_it_is_told_and_draws_contexts_with_the_same_noise(setting, tmp_path):
    LightVae(seconds=2).train(setting, tmp_path)
    sample = LightVae(seconds=2).load(setting, tmp_path)
    captions = ["a picture of a circle"] * 3
    plain, changed = (sample(captions, names, 0) for names in ([], ["quad1", "size"]))
    assert plain.shape == (3, 64, 64, 3) and plain.dtype == np.uint8
    assert np.array_equal(plain, sample(captions, [], 0)) and not np.array_equal(plain, changed)


def test_the_kernel_distance_is_near_zero_for_samples_of_the_distribution_alone():
    names = ("quad3",)
    same = quad.generate(names, n=200, seed=12).images
    other = quad.generate(("quad2",), n=200, seed=12).images
    of_same, of_other = (measure_kernel_distance(images, names, 200, True) for images in (same, other))
    assert abs(of_same["kid"]) < 0.1 * of_other["kid"]
    real, again = (quad.generate(names, n=200, seed=seed).images for seed in (REAL_SEED, REAL_B_SEED))
    features = latent_features(AutoencoderKL.from_pretrained(embedded_base(), subfolder="vae"))
    assert of_same["kid_floor"] == pytest.approx(kernel_distance(features(again), features(real), 100)[0], rel=1e-4)


@pytest.mark.parametrize("name, decides", [("training/concepts/stage.py", True), ("hub/push.py", False)])
def test_concepts_of_other_code_are_not_taken_up(tmp_path, name, decides):
    source = Path(diffusers_ctx.__file__).parent
    package = shutil.copytree(source, tmp_path / "package", ignore=shutil.ignore_patterns("assets"))
    before = learning_code_fingerprint(package)
    file = package / name
    file.write_text(file.read_text() + "# changed\n")
    assert (learning_code_fingerprint(package) != before) == decides


def setting_of(results: dict, work_dir: Path) -> QuadSetting:
    options = dict(results["options"])
    n, independent = options.pop("n"), options.pop("independent")
    assert n == 20
    return QuadSetting(dependent=not independent, work_dir=work_dir, **options)


@pytest.mark.slow
def test_a_method_is_trained_measured_and_not_measured_again(tmp_path):
    command = [
        sys.executable,
        FOLDER / "quad.py",
        "--methods",
        "ours",
        "--work_dir",
        tmp_path,
        "--results_dir",
        tmp_path,
    ]
    command += ["--images_per_context", "20", "--train_steps", "2", "--concept_steps", "4", "--n", "20"]
    written = []
    for _ in range(2):
        subprocess.run([*map(str, command), "--num_inference_steps", "2"], check=True)
        (file,) = tmp_path.glob("*/ours.json")
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1]
    results = json.loads(file.read_text())
    row = summarize_method(results)
    assert row is not None
    (folder,) = (path.parent for path in tmp_path.glob("*/ours/context_adapter.safetensors"))
    module = load_pipeline(folder, embedded_base()).context_module
    assert row["edges"] == measure_graph(module)["auroc"]
    # after two steps it still draws what the base draws, which knows no contexts
    setting = setting_of(results, tmp_path)
    base = plain_sampler(load_base(setting), setting, lambda caption, _: caption)
    for pair in quad.HELD_OUT_PAIRS:
        measured, expected = results["contexts"]["+".join(pair)], measure_combination(base, pair, 20, dependent=True)
        assert measured["swd"] == pytest.approx(expected["swd"], abs=0.06)
        assert measured["floor"] == expected["floor"]
        assert measured["kid"] == pytest.approx(expected["kid"], rel=0.5)
    assert "concepts/" in file.with_suffix(".csv").read_text()
    assert Image.open(file.with_suffix(".jpg")).width > 64
