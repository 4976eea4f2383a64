"""quad beyond our own model class: other mechanisms and interventions, wrong labels, contexts of unequal size.

quad's simulator is linear and Gaussian, as our context module is. Here it is neither, or its folders are less tidy;
images, captions and readers stay quad's. In units of the observational standard deviation a factor is

    z = sum over causes of weight * effect(cause) + scale * noise

and `linear` is quad itself. Training folders share no noise, be it of two contexts or of two seeds; variants of one
seed do, so that they differ in one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import ndtr, ndtri

from beds.bed import Attribute, Bed, BedSample, training_seed
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.quad_attributes import attribute_difference, read_attributes, true_attributes


IMAGES_PER_CONTEXT = (16, 32, 64, 100, 300, 1000)
# causes before their effects
ORDER = ("quad4", "orientation", "quad3", "shape", "quad2", "color", "quad1", "size")
# images of each training folder of the unequal variant: the observational one first, shares of the average
UNEQUAL = (2.5, 1.4, 1.1, 0.8, 0.6, 0.4, 0.2)
_SHAPE = quad.FACTORS.index("shape")
_MODE = 0.9  # of bimodal noise, which has the variance 1 of a normal one


def _same(z: np.ndarray) -> np.ndarray:
    return z


def _saturate(z: np.ndarray) -> np.ndarray:
    """Bounded; of variance 1 for a standard normal `z`."""
    return 1.2547 * np.tanh(2 * z)


def _square(z: np.ndarray) -> np.ndarray:
    """The same for both signs, bounded at two deviations; of mean 0 and variance 1 for a standard normal `z`."""
    return (np.minimum(z**2, 4) - 0.9205) / 1.1101


def _split(noise: np.ndarray) -> np.ndarray:
    """Even mixture of two normals, N(0.9, 0.19) and N(-0.9, 0.19): the sign of standard normal noise is the mode.

    The size of the noise, which is independent of its sign, becomes a standard normal within the mode.
    """
    within = -ndtri(2 * ndtr(-np.abs(noise)))
    return np.sign(noise) * (_MODE + np.sqrt(1 - _MODE**2) * within)


def _normal(mean: float, deviation: float, noise: np.ndarray) -> np.ndarray:
    return mean + deviation * noise


def _constant(mean: float, deviation: float, noise: np.ndarray) -> np.ndarray:
    return np.full_like(noise, mean)


def _two_values(mean: float, deviation: float, noise: np.ndarray) -> np.ndarray:
    return mean + deviation * np.sign(noise)


def _switch(mean: float, deviation: float, noise: np.ndarray) -> np.ndarray:
    return np.full_like(noise, np.sign(mean))


@dataclass(frozen=True)
class Variant:
    """How a simulator departs from quad's.

    Attributes:
        effect: what an effect takes from a cause.
        noise: exogenous noise, made of standard normal noise.
        concept: a concept's observational value, made of causes and noise.
        intervention: an intervened value, made of mean and standard deviation of quad's intervention, and noise.
        wrong_labels: share of images in each training folder that belong to another context.
        unequal: whether training folders have unequal numbers of images.
    """

    effect: Callable[[np.ndarray], np.ndarray] = _same
    noise: Callable[[np.ndarray], np.ndarray] = _same
    concept: Callable[[np.ndarray], np.ndarray] = _same
    intervention: Callable[[float, float, np.ndarray], np.ndarray] = _normal
    wrong_labels: float = 0.0
    unequal: bool = False


VARIANTS = {
    "linear": Variant(),
    "constant": Variant(intervention=_constant),
    "two-values": Variant(intervention=_two_values),
    "binary": Variant(concept=np.sign, intervention=_switch),
    "saturating": Variant(effect=_saturate),
    "quadratic": Variant(effect=_square),
    "bimodal": Variant(noise=_split),
    "wrong-labels": Variant(wrong_labels=0.1),
    "unequal": Variant(unequal=True),
}


class QuadBed(Bed):
    """quad and its variants.

    Scenes are the standard normal noise (n, 8) of the factors, so every counterfactual is known. Attributes are
    quad's eight factors as [`read_attributes`] gives them, with shapes as classes; any set of concepts has a truth.

    Args:
        variant: a key of [`VARIANTS`].

    Raises:
        ValueError: if there is no such variant.
    """

    resolution = quad.RESOLUTION
    concepts = quad.CONCEPTS
    attributes = tuple(
        Attribute(name, len(quad.SHAPES) if name == "shape" else None, (name,) if name in quad.CONCEPTS else ())
        for name in quad.FACTORS
    )
    held_out = (*quad.HELD_OUT_PAIRS, *quad.HELD_OUT_TRIPLES)
    license = "Apache-2.0: drawn by diffusers_ctx.data.quad"

    def __init__(self, variant: str = "linear"):
        if variant not in VARIANTS:
            raise ValueError(f"Unknown variant {variant!r}; there are {list(VARIANTS)}.")
        self.name = f"quad-{variant}"
        self.variant = VARIANTS[variant]

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Images under any set of interventions, 1,000 by default; see [`Bed.sample`].

        The same seed gives the same noise under every intervention, and fewer images are the first of more.
        """
        if not 0 <= seed < quad.FIRST_HELD_OUT_SEED:  # others would be those of held-out images
            raise ValueError(f"`seed` is {seed}; give one from 0 to {quad.FIRST_HELD_OUT_SEED - 1}.")
        rng = np.random.default_rng(seed + held_out * quad.FIRST_HELD_OUT_SEED)
        count = IMAGES_PER_CONTEXT[-1] if n is None else n
        return self._draw(rng.standard_normal((count, len(quad.FACTORS))), interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        return self._draw(sample.scenes, interventions)

    def training_sample(self, context: str, n: int | None = None, seed: int = 0) -> BedSample:
        """The images of one training folder; `n` of them, on average over folders where these are unequal.

        Where labels are wrong, `interventions` are what the folder says, and attributes what the images show.
        """
        number = list(self.contexts).index(context)
        count = IMAGES_PER_CONTEXT[-1] if n is None else n
        if self.variant.unequal:
            count = _unequal_sizes(count, seed)[number]
        sample = super().training_sample(context, count, seed)
        rng = np.random.default_rng((training_seed(seed, number), 1))  # other noise than that of the images
        wrong = rng.choice(count, round(self.variant.wrong_labels * count), replace=False)
        others = rng.choice([name for name in self.contexts if name != context], len(wrong))
        for row, other in zip(wrong, others):
            swapped = self._draw(sample.scenes[row : row + 1], self.contexts[other])
            sample.images[row], sample.attributes[row] = swapped.images[0], swapped.attributes[0]
            sample.captions[row] = swapped.captions[0]
        return sample

    def read(self, images: np.ndarray) -> np.ndarray:
        return _with_classes(read_attributes(images).values)

    def reading_error(self, sample: BedSample) -> dict[str, float]:
        """As in [`Bed.reading_error`]; orientations differ by the shorter way around their shape's period.

        They are compared where the shape was read rightly, and circles have none.
        """
        read, true = self.read(sample.images), sample.attributes
        third = np.where(np.arange(len(quad.FACTORS)) == _SHAPE, len(quad.SHAPES) - 1, 1)
        difference = attribute_difference(read / third, true / third)
        difference[:, _SHAPE] = read[:, _SHAPE] != true[:, _SHAPE]
        return dict(zip(quad.FACTORS, map(float, np.nanmean(difference, axis=0))))

    def factors(self, noise: np.ndarray, interventions: Sequence[str] = ()) -> np.ndarray:
        """Factors (n, 8) of standard normal noise (n, 8), in units of quad's observational standard deviations.

        Raises:
            ValueError: if an intervention is no concept.
        """
        unknown = [name for name in interventions if name not in self.concepts]
        if unknown:
            raise ValueError(f"Unknown concepts {unknown}; quad has {list(self.concepts)}.")
        weights, scales, interventional = _standardized_model()
        noise = self.variant.noise(noise)
        factors = np.zeros_like(noise)
        for name in ORDER:
            index = quad.FACTORS.index(name)
            if name in interventions:
                factors[:, index] = self.variant.intervention(*interventional[index], noise[:, index])
                continue
            causes = (self.variant.effect(factors) * weights[index]).sum(axis=1)  # row by row, unlike a product
            value = causes + scales[index] * noise[:, index]
            factors[:, index] = self.variant.concept(value) if name in self.concepts else value
        return factors

    def _draw(self, noise: np.ndarray, interventions: Sequence[str]) -> BedSample:
        factors = self.factors(noise, interventions)
        images, captions = quad.render(factors)
        return BedSample(images, captions, _with_classes(true_attributes(factors)), tuple(interventions), noise)


@cache
def _standardized_model() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of quad's model: weights (8, 8), row = effect; scales of the noise (8,); means and deviations of interventions.

    All are in units of the factors' observational standard deviations; the last is (8, 2).
    """
    deviation = quad.observational_deviation()
    weights = quad.edge_matrix() * deviation / deviation[:, None]
    scales = np.sqrt([quad.NOISE_VARIANCES[name] for name in quad.FACTORS]) / deviation
    mean, variance = np.array([quad.INTERVENTIONS[name] for name in quad.FACTORS]).T
    return weights, scales, np.column_stack([mean, np.sqrt(variance)]) / deviation[:, None]


def _with_classes(values: np.ndarray) -> np.ndarray:
    """Attributes with the shape's class instead of its position in [0, 1]."""
    values[:, _SHAPE] = np.rint(values[:, _SHAPE] * (len(quad.SHAPES) - 1))
    return values


def _unequal_sizes(n: int, seed: int) -> list[int]:
    """Images of each context, `n` on average; which concept has few depends on the seed."""
    shares = np.array(UNEQUAL)
    shares[1:] = np.random.default_rng((seed, 2)).permutation(shares[1:])
    edges = np.rint(np.cumsum(shares) * n).astype(int)
    return np.diff(edges, prepend=0).tolist()
