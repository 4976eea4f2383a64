import numpy as np
import pytest
from scipy.spatial.distance import pdist

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import diversity, image_diversity


def images(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def test_is_the_factor_by_which_an_attribute_is_stretched():
    reference = np.random.default_rng(0).standard_normal((50, 4))
    assert diversity(reference * [1, 0.5, 0, 3] + [0, 7, 1, -2], reference) == pytest.approx([1, 0.5, 0, 3])


def test_shows_which_attribute_of_quad_collapsed():
    factors = quad.generate((), n=500, seed=1).factors
    collapsed = quad.generate((), n=700, seed=2).factors
    collapsed[:, quad.FACTORS.index("size")] /= 10
    ratios = dict(zip(quad.FACTORS, diversity(collapsed, factors)))
    assert ratios.pop("size") == pytest.approx(0.1, rel=0.15)
    assert list(ratios.values()) == pytest.approx([1] * 7, rel=0.15)


def test_leaves_out_what_could_not_be_read():
    reference = np.random.default_rng(3).standard_normal((50, 2))
    values = np.r_[2 * reference, [[np.nan, 100], [np.nan, -100]]]
    ratios = diversity(values, np.r_[reference, [[np.nan, 0]]])
    assert ratios[0] == pytest.approx(2)
    assert ratios[1] > 10


def test_of_images_equals_all_pairs():
    a, b = images(20, seed=3), images(30, seed=4) // 2
    squares = [np.mean(pdist(x.reshape(len(x), -1).astype(float)) ** 2) for x in (a, b)]
    assert image_diversity(a, b) == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-9)
    assert image_diversity(a / 255, b) == pytest.approx(image_diversity(a, b), rel=1e-9)


def test_of_images_in_more_than_one_chunk():
    reference = quad.generate((), n=30, seed=5).images
    faded = 0.25 * reference.astype(np.float32) / 255 + 0.5
    assert image_diversity(faded, reference) == pytest.approx(0.25, rel=1e-5)
    assert image_diversity(reference[:1].repeat(5, axis=0), reference) == 0


@pytest.mark.parametrize(
    "function, values, reference, message",
    [
        (diversity, np.eye(3), np.eye(4), r"\(3, 3\) and \(4, 4\)"),
        (diversity, np.eye(3)[0], np.eye(3), r"shape \(3,\)"),
        (diversity, np.eye(3)[:1], np.eye(3), "Got 1 generated and 3 real"),
        (diversity, np.eye(3), np.eye(3) * [1, 0, 1], r"attributes \[1\] do not vary"),
        (image_diversity, images(3, 0), images(1, 0), "Got 3 generated and 1 real"),
        (image_diversity, images(3, 0), images(1, 0).repeat(2, axis=0), "are the same"),
        (image_diversity, images(3, 0)[0], images(3, 0), r"shape \(4, 5, 3\)"),
    ],
)
def test_sets_without_a_spread(function, values, reference, message):
    with pytest.raises(ValueError, match=message):
        function(values, reference)
