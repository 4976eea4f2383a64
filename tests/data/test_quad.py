"""quad against a second generator, written here one factor, one image and one pixel at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffusers_ctx.data import quad


NAMES = ["quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation"]
CAUSES = {  # effect: {cause: weight}, causes before effects
    "quad4": {},
    "quad3": {"quad4": -0.72},
    "orientation": {},
    "shape": {"orientation": 1.45},
    "color": {"shape": -1.34},
    "size": {"color": 1.67, "orientation": -0.81},
    "quad2": {"quad3": 1.56, "shape": 0.58},
    "quad1": {"quad2": -1.23, "quad4": 1.34, "color": -0.95, "orientation": 1.12},
}
NOISE_VARIANCE = {
    "quad1": 1.386,
    "quad2": 1.164,
    "quad3": 1.005,
    "quad4": 1.956,
    "size": 1.275,
    "color": 1.42,
    "shape": 1.31,
    "orientation": 1.18,
}
INTERVENED = {  # mean, variance
    "quad1": (1.169, 1.949),
    "quad2": (1.475, 1.359),
    "quad3": (-1.606, 1.573),
    "quad4": (-1.966, 1.102),
    "size": (1.012, 1.305),
    "color": (-0.85, 1.52),
    "shape": (1.23, 1.41),
    "orientation": (-0.67, 1.26),
}
PAIRS = [
    ("quad1", "quad2"),
    ("quad1", "quad3"),
    ("quad1", "quad4"),
    ("quad1", "size"),
    ("quad1", "orientation"),
    ("quad2", "quad3"),
    ("quad2", "quad4"),
    ("quad2", "size"),
    ("quad2", "orientation"),
]
CONTEXTS = [(), *[(name,) for name in NAMES], *PAIRS]
DESCENDANTS = {
    "quad1": set(),
    "quad2": {"quad1"},
    "quad3": {"quad2", "quad1"},
    "quad4": {"quad3", "quad2", "quad1"},
    "size": set(),
    "color": {"quad1", "size"},
    "shape": {"quad2", "color", "quad1", "size"},
    "orientation": {"quad1", "quad2", "size", "shape", "color"},
}


def raw_factors(noise, interventions, dependent=True):
    """One image's factors before standardisation, from its eight standard normal noises."""
    values = {}
    for name, causes in CAUSES.items():
        own = noise[NAMES.index(name)]
        if name in interventions:
            mean, variance = INTERVENED[name]
            values[name] = mean + math.sqrt(variance) * own
        else:
            values[name] = math.sqrt(NOISE_VARIANCE[name]) * own
            if dependent:
                for cause, weight in causes.items():
                    values[name] += weight * values[cause]
    return [values[name] for name in NAMES]


def law(interventions, dependent=True):
    """Mean (8,) and covariance (8, 8) of the raw factors: they are affine in the noise, one unit noise at a time."""
    mean = np.array(raw_factors([0] * 8, interventions, dependent))
    columns = []
    for index in range(8):
        unit = [0] * 8
        unit[index] = 1
        columns.append(np.array(raw_factors(unit, interventions, dependent)) - mean)
    effects = np.stack(columns, axis=1)
    return mean, effects @ effects.T


def standard_law(interventions, dependent=True):
    observational_mean, observational_covariance = law((), dependent)
    mean, covariance = law(interventions, dependent)
    deviation = np.sqrt(np.diag(observational_covariance))
    return (mean - observational_mean) / deviation, covariance / np.outer(deviation, deviation)


def unit_interval(factor):
    return 0.5 * (1 + math.erf(factor / math.sqrt(2)))


def hue(unit):
    """8-bit RGB of a position between red (0) and magenta (1)."""
    stops = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]
    for index in range(5):
        if unit <= (index + 1) / 5:
            share = unit * 5 - index
            return [round(a + share * (b - a)) for a, b in zip(stops[index], stops[index + 1])]
    raise AssertionError(unit)


def corners_of_regular_polygon(count, radius, first, turn):
    """Corners in image coordinates (y down), the first at `first` from the upward direction, all turned clockwise."""
    angles = [first + turn + 2 * math.pi * index / count for index in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def outline(shape, extent, turn):
    """Points (m, 2) on the figure's edge, seen from the picture's centre, y down, closely spaced and in order."""
    if shape in ("circle", "ellipse"):
        long, short = extent / 2, extent / (2 if shape == "circle" else 4)
        points = []
        for angle in np.arange(360) * math.pi / 180:
            x, y = long * math.cos(angle), short * math.sin(angle)
            points.append((x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)))
        return np.array(points)
    if shape == "square":
        corners = corners_of_regular_polygon(4, extent / math.sqrt(2), math.pi / 4, turn)
    else:
        corners = corners_of_regular_polygon(3, extent / 2, 0, turn)
    sides = zip(corners, corners[1:] + corners[:1])
    return np.concatenate([np.linspace(start, end, 100) for start, end in sides])


def inside(points, x, y):
    """Whether a point lies in a convex figure, given its outline in clockwise order."""
    edges = np.roll(points, -1, axis=0) - points
    return bool((edges[:, 0] * (y - points[:, 1]) - edges[:, 1] * (x - points[:, 0]) >= -1e-9).all())


def area(shape, extent):
    return {
        "circle": math.pi / 4 * extent**2,
        "square": extent**2,
        "triangle": 3 * math.sqrt(3) / 4 * (extent / 2) ** 2,
        "ellipse": math.pi / 8 * extent**2,
    }[shape]


@pytest.fixture(scope="module")
def observational():
    return quad.generate((), n=10_000, seed=11)


@pytest.mark.parametrize("interventions", CONTEXTS, ids="+".join)
@pytest.mark.parametrize("dependent", [True, False])
def test_factors_follow_the_equations(interventions, dependent):
    sample = quad.generate(interventions, n=6, seed=3, dependent=dependent)
    deviation = np.sqrt(np.diag(law((), dependent)[1]))
    for noise, factors in zip(sample.noise, sample.factors):
        np.testing.assert_allclose(factors, np.array(raw_factors(noise, interventions, dependent)) / deviation)


def test_noise_is_standard_normal_and_independent(observational):
    noise = observational.noise
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
    np.testing.assert_allclose(np.cov(noise.T), np.eye(8), atol=0.06)


@pytest.mark.parametrize("interventions", [(), ("quad4",), ("orientation",), ("quad1", "quad4"), ("quad2", "size")])
def test_laws_match_the_second_generator(interventions, observational):
    n = 4000
    sample = quad.generate(interventions, n=n, seed=21)
    other = np.random.default_rng(77).standard_normal((n, 8))
    deviation = np.sqrt(np.diag(law(())[1]))
    expected = np.array([raw_factors(noise, interventions) for noise in other]) / deviation
    for ours, theirs in zip(sample.factors.T, expected.T):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-4
    mean, covariance = standard_law(interventions)
    error = 5 * np.sqrt(np.diag(covariance) / n)
    assert (abs(sample.factors.mean(0) - mean) < error).all()
    # the deviation of an entry of the empirical covariance of Gaussians
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n)
    assert (abs(np.cov(sample.factors.T) - covariance) < 5 * spread).all()


def test_observational_factors_are_standardised_and_dependent(observational):
    np.testing.assert_allclose(observational.factors.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(observational.factors.std(0), 1, atol=0.05)
    correlation = np.corrcoef(observational.factors.T)
    assert correlation[NAMES.index("quad2"), NAMES.index("quad1")] < -0.5
    assert correlation[NAMES.index("color"), NAMES.index("size")] > 0.5


def test_independent_factors_are_uncorrelated():
    sample = quad.generate(("quad1", "size"), n=4000, seed=5, dependent=False)
    correlation = np.corrcoef(sample.factors.T)
    assert abs(correlation - np.eye(8)).max() < 0.08


def test_hue_is_linear_between_six_colors():
    positions = np.linspace(0, 1, 101)
    expected = np.array([hue(min(position, 1.0)) for position in positions])
    assert abs(quad.hue(positions) * 255 - expected).max() <= 0.51
    stops = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]
    np.testing.assert_array_equal(quad.hue(np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])), stops)


def test_pixels_match_the_geometry_of_their_factors():
    sample = quad.generate((), n=32, seed=9)
    drawn = set()
    for image, factors, caption in zip(sample.images, sample.factors, sample.captions):
        units = dict(zip(NAMES, map(unit_interval, factors)))
        shape = ["circle", "square", "triangle", "ellipse"][round(3 * units["shape"])]
        drawn.add(shape)
        assert shape in caption
        extent, turn = 48 * (0.2 + 0.8 * units["size"]), 2 * math.pi * units["orientation"]
        figure = np.array(hue(units["color"]))
        backgrounds = {name: np.array(hue(units[name])) for name in ("quad1", "quad2", "quad3", "quad4")}
        edge = outline(shape, extent, turn)
        for row in range(64):
            for column in range(64):
                name = (("quad3", "quad4"), ("quad1", "quad2"))[row >= 32][column >= 32]
                background = backgrounds[name]
                x, y = column + 0.5 - 32, row + 0.5 - 32
                pixel = image[row, column].astype(int)
                # edges are blurred by half a pixel, which at a triangle's corner reaches a whole pixel out
                if np.hypot(edge[:, 0] - x, edge[:, 1] - y).min() > 1.05:
                    expected = figure if inside(edge, x, y) else background
                    assert abs(pixel - expected).max() <= 1, (shape, row, column)
                else:
                    low, high = np.minimum(figure, background), np.maximum(figure, background)
                    assert (pixel >= low - 1).all() and (pixel <= high + 1).all(), (shape, row, column)
    assert drawn == {"circle", "square", "triangle", "ellipse"}


def test_figures_cover_their_area():
    """A pixel's color tells its share of the figure, so areas can be measured to a fraction of a pixel's width."""
    sample = quad.generate((), n=200, seed=13)
    measured = set()
    for image, factors in zip(sample.images, sample.factors):
        units = dict(zip(NAMES, map(unit_interval, factors)))
        shape = ["circle", "square", "triangle", "ellipse"][round(3 * units["shape"])]
        extent = 48 * (0.2 + 0.8 * units["size"])
        covered = 0.0
        for name, rows, columns in (
            ("quad1", slice(32, 64), slice(0, 32)),
            ("quad2", slice(32, 64), slice(32, 64)),
            ("quad3", slice(0, 32), slice(0, 32)),
            ("quad4", slice(0, 32), slice(32, 64)),
        ):
            difference = np.array(hue(units["color"])) - np.array(hue(units[name]))
            channel = abs(difference).argmax()
            if abs(difference[channel]) < 60:
                break  # figure and background too alike to tell apart
            background = hue(units[name])[channel]
            covered += ((image[rows, columns, channel].astype(float) - background) / difference[channel]).sum()
        else:
            assert covered == pytest.approx(area(shape, extent), rel=0.01, abs=1.0), shape
            measured.add(shape)
    assert measured == {"circle", "square", "triangle", "ellipse"}


def test_captions_name_the_shape(observational):
    words = {"circle": 0, "square": 0, "triangle": 0, "ellipse": 0}
    for caption, factor in zip(observational.captions, observational.factors[:, NAMES.index("shape")]):
        shape = ["circle", "square", "triangle", "ellipse"][round(3 * unit_interval(factor))]
        words[shape] += 1
        assert caption == f"a picture of {'an' if shape == 'ellipse' else 'a'} {shape}"
    # round(3u) of a uniform u: the two shapes at the ends are half as frequent
    np.testing.assert_allclose([count / 10_000 for count in words.values()], [1 / 6, 1 / 3, 1 / 3, 1 / 6], atol=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dependent", [True, False])
def test_a_counterfactual_keeps_the_noise_and_changes_descendants_only(name, dependent):
    factual = quad.generate((), n=8, seed=4, dependent=dependent)
    counterfactual = factual.counterfactual([name])
    np.testing.assert_array_equal(counterfactual.noise, factual.noise)
    changed = {name} | (DESCENDANTS[name] if dependent else set())
    for index, factor in enumerate(NAMES):
        moved = abs(counterfactual.factors[:, index] - factual.factors[:, index]) > 1e-9
        assert moved.all() if factor in changed else not moved.any(), factor
    # the outermost pixel of each quadrant is never covered by the figure
    for factor, row, column in (("quad1", 63, 0), ("quad2", 63, 63), ("quad3", 0, 0), ("quad4", 0, 63)):
        same = (counterfactual.images[:, row, column] == factual.images[:, row, column]).all(axis=-1)
        assert same.all() if factor not in changed else not same.all(), factor


def test_counterfactuals_go_back_and_on():
    factual = quad.generate(("quad4",), n=5, seed=8)
    observational = factual.counterfactual([])
    np.testing.assert_array_equal(observational.images, quad.generate((), n=5, seed=8).images)
    pair = observational.counterfactual(["quad1", "quad4"])
    np.testing.assert_array_equal(pair.images, quad.generate(("quad1", "quad4"), n=5, seed=8).images)
    assert pair.interventions == ("quad1", "quad4")
    np.testing.assert_array_equal(pair.counterfactual(["quad4"]).images, factual.images)


def test_seeds():
    first, again, other = (quad.generate((), n=4, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.images, again.images)
    assert first.captions == again.captions
    assert not np.isclose(first.noise, other.noise).any()


def test_arrays_have_the_promised_shapes_and_types():
    sample = quad.generate(["quad1"], n=3)
    assert sample.images.shape == (3, 64, 64, 3) and sample.images.dtype == np.uint8
    assert sample.factors.shape == sample.noise.shape == (3, 8)
    assert len(sample) == len(sample.captions) == 3
    assert len(quad.generate(n=0)) == 0


def test_the_contexts_of_the_benchmark():
    assert list(quad.contexts()) == ["obs", "quad1", "quad2", "quad3", "quad4", "size", "orientation"]
    assert list(quad.FACTORS) == NAMES
    assert list(quad.HELD_OUT_PAIRS) == PAIRS
    assert {name: quad.descendants(name) for name in NAMES} == DESCENDANTS


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"interventions": ["quad5"]}, "quad5.*quad1"),
        ({"interventions": "quad1"}, r"\['quad1'\]"),
        ({"n": -1}, "negative"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        quad.generate(**arguments)


def test_pictures_are_those_of_the_first_version():
    """Results of old runs stay comparable; processors that round differently may be one level off."""
    reference = np.asarray(Image.open(Path(__file__).with_name("quad_reference.png")).convert("RGB")).astype(int)
    combinations = [(), ("quad1",), ("quad4", "size"), ("orientation",)]
    rows = [
        np.concatenate(list(quad.generate(interventions, 4, 20, dependent).images), axis=1)
        for interventions in combinations
        for dependent in (True, False)
    ]
    difference = abs(np.concatenate(rows) - reference)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_factors_can_be_rendered_on_their_own():
    sample = quad.generate(("size",), n=70, seed=3)
    images, captions = quad.render(sample.factors)
    np.testing.assert_array_equal(images, sample.images)
    assert captions == sample.captions


def test_a_smaller_set_in_the_same_folder_leaves_nothing_of_the_larger_one(tmp_path):
    for n in (4, 2):
        quad.write_folders(tmp_path, n=n, seed=0)
    assert sorted(path.name for path in (tmp_path / "size").iterdir()) == ["00000.png", "00001.png", "metadata.csv"]
