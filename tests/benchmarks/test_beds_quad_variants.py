"""The variants of quad against a second simulator, written here one image and one factor at a time."""

import math
import statistics

import numpy as np
import pytest
from beds.bed import training_seed
from beds.quad_variants import IMAGES_PER_CONTEXT, VARIANTS, QuadBed
from PIL import Image
from scipy import stats

from diffusers_ctx.data import quad


NORMAL = statistics.NormalDist()
CAUSES_FIRST = ["orientation", "shape", "color", "size", "quad4", "quad3", "quad2", "quad1"]
COMBINATIONS = [(), ("quad4",), ("orientation",), ("quad1", "size"), ("quad2", "size", "orientation")]
DEVIATIONS = dict(zip(quad.FACTORS, quad.observational_deviation()))


def own_noise(variant, value):
    if variant != "bimodal":
        return value
    # the rank of |value| among absolute values is that of the draw within its mode
    within = NORMAL.inv_cdf(2 * NORMAL.cdf(abs(value)) - 1)
    return math.copysign(1, value) * (0.9 + math.sqrt(0.19) * within)


def taken_from(variant, cause):
    if variant == "saturating":
        return 1.2547 * (1 - 2 / (math.exp(4 * cause) + 1))
    if variant == "quadratic":
        return (min(cause**2, 4) - 0.9205) / 1.1101
    return cause


def intervened(variant, name, noise):
    """In quad's raw units."""
    mean, variance = quad.INTERVENTIONS[name]
    return {
        "constant": mean,
        "two-values": mean + math.sqrt(variance) * (1 if noise > 0 else -1),
        "binary": DEVIATIONS[name] * (1 if mean > 0 else -1),
    }.get(variant, mean + math.sqrt(variance) * noise)


def standardized_factors(variant, noise, interventions):
    raw = {}
    for name in CAUSES_FIRST:
        own = own_noise(variant, noise[quad.FACTORS.index(name)])
        if name in interventions:
            raw[name] = intervened(variant, name, own)
            continue
        raw[name] = math.sqrt(quad.NOISE_VARIANCES[name]) * own
        for (cause, effect), weight in quad.EDGES.items():
            if effect == name:
                raw[name] += weight * DEVIATIONS[cause] * taken_from(variant, raw[cause] / DEVIATIONS[cause])
        if variant == "binary" and name in quad.CONCEPTS:
            raw[name] = math.copysign(DEVIATIONS[name], raw[name])
    return [raw[name] / DEVIATIONS[name] for name in quad.FACTORS]


def factors_of(variant, interventions=(), n=20_000):
    bed = QuadBed(variant)
    noise = np.random.default_rng(7).standard_normal((n, 8))
    return dict(zip(quad.FACTORS, bed.factors(noise, interventions).T))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interventions", COMBINATIONS, ids="+".join)
def test_factors_follow_the_equations(variant, interventions):
    noise = np.random.default_rng(3).standard_normal((5, 8))
    expected = [standardized_factors(variant, row, interventions) for row in noise]
    np.testing.assert_allclose(QuadBed(variant).factors(noise, interventions), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("interventions", COMBINATIONS, ids="+".join)
def test_the_linear_variant_is_quad(interventions):
    bed = QuadBed()
    for held_out, seed in ((False, 5), (True, quad.FIRST_HELD_OUT_SEED + 5)):
        expected = quad.generate(interventions, 20, seed)
        sample = bed.sample(interventions, 20, 5, held_out)
        assert sample.captions == expected.captions
        difference = abs(sample.images.astype(int) - expected.images)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-4  # factors are summed in another order


def test_interventions_of_no_or_two_values():
    names = ("constant", "two-values", "linear")
    constant, two_values, linear = (factors_of(name, ("quad3",))["quad3"] for name in names)
    assert np.ptp(constant) == 0
    assert len(np.unique(two_values)) == 2
    for other in (constant, two_values):
        assert other.mean() == pytest.approx(linear.mean(), abs=0.02)
    assert two_values.std() == pytest.approx(linear.std(), rel=0.02)
    assert len(np.unique(factors_of("two-values")["quad3"])) == 20_000


def test_binary_concepts_have_two_values_and_an_intervention_one():
    observed = factors_of("binary")
    for name in quad.CONCEPTS:
        assert sorted(np.unique(observed[name])) == [-1, 1]
        assert 0.3 < (observed[name] > 0).mean() < 0.7
        assert np.ptp(factors_of("binary", (name,))[name]) == 0
    assert np.corrcoef(observed["quad2"], observed["quad1"])[0, 1] < -0.3


def test_bimodal_noise_is_an_even_mixture_of_two_normals():
    modes = [stats.norm(center, math.sqrt(1 - 0.9**2)) for center in (-0.9, 0.9)]
    observed, intervened = factors_of("bimodal")["quad4"], factors_of("bimodal", ("quad4",))["quad4"]
    mean, variance = quad.INTERVENTIONS["quad4"]
    for values in (observed, (intervened * DEVIATIONS["quad4"] - mean) / math.sqrt(variance)):
        assert stats.kstest(values, lambda x: sum(mode.cdf(x) for mode in modes) / 2).pvalue > 1e-3
        assert (abs(values) < 0.3).mean() < 0.12  # a normal one of the same variance has 0.24


def test_effects_that_saturate_or_have_no_sign():
    saturating, quadratic = factors_of("saturating"), factors_of("quadratic")
    for factors in (saturating, quadratic):  # what a standard normal cause adds has mean 0 and variance 1
        assert factors["quad3"].mean() == pytest.approx(0, abs=0.03)
        assert factors["quad3"].std() == pytest.approx(1, abs=0.03)
    weight = quad.EDGES["quad4", "quad3"] * DEVIATIONS["quad4"] / DEVIATIONS["quad3"]
    strong = saturating["quad4"] > 1.5
    assert saturating["quad3"][strong].mean() == pytest.approx(weight * 1.2547, abs=0.1)
    assert abs(np.corrcoef(quadratic["quad4"], quadratic["quad3"])[0, 1]) < 0.05
    assert np.corrcoef(quadratic["quad4"] ** 2, quadratic["quad3"])[0, 1] < -0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_fill_their_range(variant):
    """No variant's observational pictures are all at the ends of the hues, or all alike."""
    for name, values in factors_of(variant).items():
        assert abs(values.mean()) < 0.8 and 0.6 < values.std() < 2, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_counterfactuals_keep_the_noise_and_change_what_is_caused(variant):
    bed = QuadBed(variant)
    factual = bed.sample(("quad4",), 12, 2)
    counterfactual = bed.counterfactual(factual, ("quad4", "size"))
    np.testing.assert_array_equal(counterfactual.images, bed.sample(("quad4", "size"), 12, 2).images)
    np.testing.assert_array_equal(counterfactual.scenes, factual.scenes)
    np.testing.assert_array_equal(bed.counterfactual(counterfactual, ("quad4",)).images, factual.images)
    size = quad.FACTORS.index("size")
    assert (counterfactual.attributes[:, size] != factual.attributes[:, size]).any()
    np.testing.assert_array_equal(
        np.delete(counterfactual.attributes, size, axis=1), np.delete(factual.attributes, size, axis=1)
    )


def test_training_sets_share_no_noise():
    bed = QuadBed("wrong-labels")
    sets = [bed.training_sample(context, 8, seed).scenes for seed in range(12) for context in bed.contexts]
    noise = np.concatenate([*sets, bed.sample((), 8, training_seed(0, 0), held_out=True).scenes])
    assert len(np.unique(noise)) == noise.size


def test_small_training_sets_are_the_start_of_larger_ones():
    bed = QuadBed("bimodal")
    samples = [bed.training_sample("quad2", n, 1) for n in IMAGES_PER_CONTEXT[:3]]
    assert [len(sample) for sample in samples] == [16, 32, 64]
    np.testing.assert_array_equal(samples[0].images, samples[2].images[:16])
    assert len(bed.sample()) == 1000


def test_a_tenth_of_labels_is_wrong_in_folders_alone(tmp_path):
    bed = QuadBed("wrong-labels")
    bed.write_folders(tmp_path, 20, seed=1)
    linear, of = QuadBed("linear"), set()
    for number, (context, interventions) in enumerate(bed.contexts.items()):
        true, clean = (which.sample(interventions, 20, training_seed(1, number)) for which in (bed, linear))
        np.testing.assert_array_equal(true.images, clean.images)
        written = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / context).glob("*.png"))])
        wrong = np.flatnonzero((written != true.images).any((1, 2, 3)))
        assert len(wrong) == 2
        sample = bed.training_sample(context, 20, 1)
        assert sample.interventions == interventions
        np.testing.assert_array_equal(sample.images, written)
        for row in wrong:
            worlds = {name: bed.counterfactual(sample, bed.contexts[name]) for name in bed.contexts if name != context}
            (shown,) = [name for name, world in worlds.items() if (world.images[row] == written[row]).all()]
            np.testing.assert_array_equal(sample.attributes[row], worlds[shown].attributes[row])
            assert sample.captions[row] == worlds[shown].captions[row]
            of.add(shown)
    assert len(of) > 2


def test_unequal_folders_have_as_many_images_in_all(tmp_path):
    bed = QuadBed("unequal")
    counts = {}
    for seed in (0, 1):
        bed.write_folders(tmp_path, 16, seed)
        counts[seed] = {context: len(list((tmp_path / context).glob("*.png"))) for context in bed.contexts}
        assert sum(counts[seed].values()) == 16 * 7
        assert max(counts[seed], key=counts[seed].get) == "obs"
        assert min(counts[seed].values()) <= 4
    assert counts[0] != counts[1]
    assert len(bed.sample(("size",), 16)) == 16


def test_captions_name_the_shape_and_no_concept():
    sample = QuadBed("quadratic").sample(("quad1",), 40)
    for caption, attributes in zip(sample.captions, sample.attributes):
        assert caption.split()[-1] == quad.SHAPES[int(attributes[quad.FACTORS.index("shape")])]
        assert not any(name in caption for name in ("quad", "size", "orientation"))


@pytest.mark.parametrize("variant", ["two-values", "binary", "quadratic"])
def test_readers_find_the_truth(variant):
    bed = QuadBed(variant)
    errors = bed.reading_error(bed.sample(("quad2",), 60, 4, held_out=True))
    assert errors.pop("shape") == 0
    assert list(errors) == [name for name in quad.FACTORS if name != "shape"]
    assert max(errors.values()) < 0.01


def test_reading_errors_of_known_size():
    bed = QuadBed()
    sample = bed.sample((), 30)
    shape, orientation, hue = (quad.FACTORS.index(name) for name in ("shape", "orientation", "quad1"))
    sample.attributes[0, shape] = (sample.attributes[0, shape] + 1) % 4
    sample.attributes[:, hue] += 0.25
    period = np.array([np.nan, 1 / 4, 1 / 3, 1 / 2])[sample.attributes[:, shape].astype(int)]
    sample.attributes[:, orientation] += 0.9 * period  # nearer by the other way around
    errors = bed.reading_error(sample)
    assert errors["shape"] == pytest.approx(1 / 30)
    assert errors["quad1"] == pytest.approx(0.25, abs=0.01)
    assert errors["orientation"] == pytest.approx(0.1 * np.nanmean(period[1:]), abs=0.01)


def test_sheet_has_a_row_for_every_combination():
    bed = QuadBed("constant")
    width, height = bed.contact_sheet(columns=2).size
    assert width == 2 * 64 and height > (len(bed.contexts) + len(bed.held_out)) * 64
    assert all(set(pair) <= set(bed.concepts) for pair in bed.held_out)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: QuadBed("cubic"), "cubic.*quadratic"),
        (lambda: QuadBed().sample(("color",), 1), "color.*orientation"),
        (lambda: QuadBed().sample((), 1, quad.FIRST_HELD_OUT_SEED), "999999"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
