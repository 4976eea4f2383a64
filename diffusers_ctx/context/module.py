"""The context module: from exogenous noise and a context to tokens for a diffusion model, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from .captions import CaptionLikelihood
from .causal import ReducedForm, Structural, upcast_half
from .layers import ExpressiveLayers, MechanismLayer, ReadOut
from .names import normal_name
from .posterior import GaussianHead, GaussianPosterior, LatentEncoder, PosteriorEncoder


_CANDIDATES = 64  # for exogenous noise that fits a caption


class ContextModule(ModelMixin, ConfigMixin):
    r"""The context module of Markham et al. (arXiv 2507.04754), for the conditioning of a diffusion model.

    Exogenous noise `z` passes through each concept's mechanism (observational or intervened, by the mask), its
    expressive layers, the causal layer by which concepts affect one another, and a read-out to tokens. The posterior
    goes the other way: from an image and its context to the noise that explains it.

    Nodes are the concepts in order, followed by the hidden factors, on which no context intervenes: they represent
    common causes and whatever else varies.

    Args:
        concepts (`list[str]`): names of the concepts.
        token_dim (`int`): width of the tokens, that of the backbone's text.
        obs_context (`str`): name of the context without interventions.
        num_hidden_factors (`int`): nodes that no context intervenes on.
        noise_dim (`int`): width of a node's noise `z`.
        concept_dim (`int`): width of a node's value `c`.
        expressive_depth (`int`): layers of the MLP between mechanism and causal layer; 0 is the identity.
        causal_form (`str`): `"structural"`, a structural causal model, or `"reduced_form"`, the paper's form.
        graph (`list[tuple[str, str]]`, *optional*): edges (cause, effect) for the structural form. Hidden factors are
            called `hidden_0`, `hidden_1`, …; a graph that names none of them lets each cause every concept. Without a
            graph, one is learned.
        tokens_per_concept (`int`): tokens that a node's value is read out to.
        readout_width (`int`): hidden width of the read-out.
        posterior_type (`str`): `"inverse"` reads the concepts' values off the image, the same in every context, and
            inverts the mechanisms of the context to get the noise; `"amortized"` predicts the noise from image and
            mask, and works with expressive layers.
        posterior_in_channels (`int`): channels of the latents or features that the posterior takes.
        posterior_width (`int`): channels of the posterior's convolutions.
        posterior_sample_size (`int`): height and width of the latents.
        posterior_encoder (`str`): what makes the posterior's input: `"vae"` latents, or `"unet"`, `"transformer"`
            or `"clip"` features, see [`~adapter.image_features`]. The methods call either of them latents.
        posterior_encoder_model (`str`, *optional*): the CLIP model, by the name of its repository or folder.
        posterior_feature_size (`int`, *optional*): height and width of the features, where there are any.
        caption_dim (`int`, *optional*): width of captions' embeddings, for drawing noise that fits a caption.
        nodes_without_noise (`list[str]`): nodes that are what the context alone says; see `leave_out_noise`.

    Raises:
        ValueError: if concepts are missing, repeated or named like the observational context, or options contradict
            one another.
    """

    config_name = "config.json"
    has_noise: torch.Tensor

    @register_to_config
    def __init__(
        self,
        concepts: Sequence[str],
        token_dim: int,
        obs_context: str = "obs",
        num_hidden_factors: int = 2,
        noise_dim: int = 4,
        concept_dim: int = 4,
        expressive_depth: int = 0,
        causal_form: Literal["structural", "reduced_form"] = "structural",
        graph: Sequence[tuple[str, str]] | None = None,
        tokens_per_concept: int = 1,
        readout_width: int = 64,
        posterior_type: Literal["inverse", "amortized"] = "inverse",
        posterior_in_channels: int = 4,
        posterior_width: int = 64,
        posterior_sample_size: int = 8,
        posterior_encoder: PosteriorEncoder = "vae",
        posterior_encoder_model: str | None = None,
        posterior_feature_size: int | None = None,
        caption_dim: int | None = None,
        nodes_without_noise: Sequence[str] = (),
    ):
        super().__init__()
        concepts, obs_context = [normal_name(concept) for concept in concepts], normal_name(obs_context)
        self.register_to_config(concepts=concepts, obs_context=obs_context)
        _check_concepts(concepts, obs_context)
        if posterior_type == "inverse" and expressive_depth > 0:
            raise ValueError(
                "Expressive layers have no inverse: an inverse posterior needs `expressive_depth=0`; set that, or"
                " `posterior_type='amortized'`."
            )
        num_concepts, num_nodes = len(concepts), len(concepts) + num_hidden_factors
        self.mechanism = MechanismLayer(num_concepts, num_hidden_factors, noise_dim)
        self.expressive = ExpressiveLayers(num_nodes, noise_dim, concept_dim, expressive_depth)
        self.causal = _causal_layer(causal_form, concepts, num_hidden_factors, concept_dim, graph)
        self.read_out = ReadOut(num_nodes, concept_dim, readout_width, tokens_per_concept, token_dim)
        self.encoder = LatentEncoder(
            posterior_in_channels,
            posterior_width,
            posterior_feature_size or posterior_sample_size,
            standardize=posterior_encoder != "vae",
        )
        if posterior_type == "inverse":
            self.head = GaussianHead(self.encoder.out_dim, 4 * posterior_width, num_nodes, concept_dim)
        elif posterior_type == "amortized":
            self.head = GaussianHead(self.encoder.out_dim + num_concepts, 4 * posterior_width, num_nodes, noise_dim)
        else:
            raise ValueError(f"Unknown posterior_type '{posterior_type}'; choose 'inverse' or 'amortized'.")
        self.register_buffer("has_noise", torch.ones(num_nodes, 1), persistent=False)
        self.leave_out_noise(nodes_without_noise)
        self.captions = None
        if caption_dim is not None:
            self.captions = CaptionLikelihood(num_nodes * concept_dim, caption_dim)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(N, d_z): concepts and hidden factors, and the width of each one's noise."""
        return self.config.num_hidden_factors + len(self.config.concepts), self.config.noise_dim

    @property
    def tokens_shape(self) -> tuple[int, int, int]:
        """(N, T, token_dim) of the tokens of one image."""
        return self.noise_shape[0], self.config.tokens_per_concept, self.config.token_dim

    @property
    def node_names(self) -> list[str]:
        return [*self.config.concepts, *_hidden_names(self.config.num_hidden_factors, self.config.concepts)]

    def concept_values(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Values `c` (B, N, d_c) of the nodes, from noise (B, N, d_z) and a mask (B, K)."""
        return self.causal(self.expressive(self.mechanism(z * self.has_noise.to(z), mask)), mask)

    def leave_out_noise(self, nodes: Sequence[str]) -> None:
        """Takes from these nodes the exogenous noise, and gives it back to all others.

        The mechanism of a node without noise is a constant in each regime, its own cause: `u_k = (1 - m_k) a_k^obs +
        m_k a_k^do`. What the posterior infers of its noise has no effect.

        Raises:
            ValueError: if there is no such node.
        """
        unknown = sorted(set(nodes) - set(self.node_names))
        if unknown:
            raise ValueError(f"`nodes_without_noise` names {unknown}; the nodes are {self.node_names}.")
        self.register_to_config(nodes_without_noise=list(nodes))
        self.has_noise.copy_(torch.tensor([[float(name not in nodes)] for name in self.node_names]))

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, T, token_dim), from noise (B, N, d_z) and a mask (B, K) in [0, 1]."""
        z = z.to(self.dtype)
        return self.read_out(self.concept_values(z, mask.to(z)))

    @property
    def candidates_shape(self) -> tuple[int, int]:
        """(M, N d_z + 1): candidates that `choose_noise` chooses among, and the numbers that each takes."""
        num_nodes, noise_dim = self.noise_shape
        return _CANDIDATES, num_nodes * noise_dim + 1

    def choose_noise(self, normal: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Draws noise (B, N, d_z) of images that captions (B, D) describe.

        Importance resampling of M candidates from the prior, for `p(z | t)` in proportion to `p(z) p(t | c(z))`. The
        values `c` are those of the observational context: a caption describes what an intervention is then applied
        to, and so the noise does not depend on the intervention.

        Args:
            normal: (B, M, N d_z + 1), standard normal numbers; `candidates_shape` has the last two. A candidate's
                last number decides the choice, the others are its noise.
            captions: their embeddings, see [`~context.captions.CaptionLikelihood`]; the average one says nothing.

        Raises:
            ValueError: if the module has not learned what captions say.
        """
        likelihood = self.require_captions()
        candidates, uniform = normal[..., :-1].unflatten(-1, self.noise_shape), torch.special.ndtr(normal[..., -1])
        z = candidates.flatten(0, 1).to(self.dtype)
        values = self.concept_values(z, z.new_zeros(len(z), len(self.config.concepts)))
        scores = likelihood(values.unflatten(0, uniform.shape), captions).float()
        gumbel = -(-uniform.log()).log()  # the largest sum is a draw with the scores as log-weights (Gumbel-max)
        return candidates[torch.arange(len(candidates)), (scores + gumbel).argmax(dim=1)]

    @property
    def knows_captions(self) -> bool:
        """Whether the module has learned what captions say, and noise can be drawn to fit."""
        return self.captions is not None and bool(self.captions.embed_caption.weight.any() and self.has_noise.any())

    def require_captions(self) -> CaptionLikelihood:
        """The part of the module that learns what captions say.

        Raises:
            ValueError: if there is none.
        """
        if self.captions is None:
            raise ValueError(
                "This context adapter was trained without learning what captions say; train it again with captions, or"
                " leave out `match_prompt`."
            )
        return self.captions

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        """The posterior of the noise, given latents (B, C, h, w) and the mask (B, K) of the context they came from.

        It is in single precision at least, also under autocast where the module itself is.
        """
        with _out_of_autocast(latents.device.type):
            features = self.encoder(latents.to(self.dtype))
            mask = mask.to(features)
            if self.config.posterior_type == "inverse":
                mean, log_variance = map(upcast_half, self.head(features))
                return self.noise_posterior(mean, log_variance, mask)
            mean, log_variance = map(upcast_half, self.head(torch.cat([features, mask], dim=1)))
            return GaussianPosterior.diagonal(mean, log_variance)

    def noise_posterior(self, mean: torch.Tensor, log_variance: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        """The posterior of the noise, from mean and log-variance (B, N, d) of the values and masks (B, K).

        The inverse of causal layer and mechanisms is affine, so the result is Gaussian again. Values
        do not depend on the context: only the mechanisms can explain the shift between contexts, and not the noise.
        """
        matrix, shift, log_volume = inverse_mechanisms(self.mechanism, self.causal, mask)
        z = (matrix @ mean.flatten(1)[..., None])[..., 0] - shift
        factor = matrix * (0.5 * log_variance).exp().flatten(1)[:, None, :]
        return GaussianPosterior(z.view_as(mean), factor, 0.5 * log_variance.sum(dim=-1) + log_volume)

    def log_prob(self, values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Log-density (B, C) of node values (B, N, d) in each of C contexts (C, K), under the mechanisms.

        By a change of variables to the noise, `log N(z; 0, I) + log |det dz/dc|`. What `values` are a function of does
        not matter when contexts are compared: its volume is the same in all of them.

        Raises:
            ValueError: if there are expressive layers, which have no inverse.
        """
        if self.config.expressive_depth > 0:
            raise ValueError("Expressive layers have no inverse; the density is known for `expressive_depth=0` alone.")
        noise, log_volumes = self.noise_of(values, masks)
        return log_standard_normal(noise) + log_volumes

    def noise_of(self, values: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, N, d) that node values (B, N, d) come from in each of C contexts (C, K), and `log |det dz/dc|`
        (C,) of that map; there must be no expressive layers."""
        matrix, shift, log_volume = inverse_mechanisms(self.mechanism, self.causal, masks.to(values))
        z = torch.einsum("cij,bj->bci", matrix, values.flatten(1)) - shift
        return z.unflatten(-1, values.shape[1:]), log_volume.sum(dim=1)

    def read_values(self, latents: torch.Tensor) -> torch.Tensor:
        """Most likely values (B, N, d_c) of the nodes, read off latents (B, C, h, w) by an inverse posterior."""
        return self.read_code(latents)[0]

    def read_code(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance (B, N, d_c) of the values that an inverse posterior reads off latents (B, C, h, w)."""
        return self.head(self.encoder(latents.to(self.dtype)))


def inverse_mechanisms(
    mechanism: MechanismLayer, causal: ReducedForm | Structural, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The map from node values back to the noise that they come from, where there are no expressive layers.

    With `e = M(m)^-1 c` and `z = A(m)^-1 (e - a(m))` it is affine, `z = L c - s`.

    Args:
        mechanism: has `A` and `a`.
        causal: has `M`.
        mask: (B, K).

    Returns:
        `L` (B, N d, N d), `s` (B, N d) and each node's share of `log |det L|` (B, N), in single precision at least.
    """
    weight, bias = map(upcast_half, mechanism.coefficients(mask))
    unmix = upcast_half(causal.inverse_matrix(mask))
    inverse_weight = torch.linalg.inv(weight)
    batch, nodes, dim = bias.shape
    matrix = (inverse_weight @ unmix.view(batch, nodes, dim, nodes * dim)).flatten(1, 2)
    shift = (inverse_weight @ bias[..., None]).flatten(1)
    log_volume = torch.linalg.slogdet(unmix).logabsdet[:, None] / nodes - torch.linalg.slogdet(weight).logabsdet
    return matrix, shift, log_volume


def log_standard_normal(noise: torch.Tensor) -> torch.Tensor:
    """Log-density of N(0, I) over the last two dimensions."""
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(dim=(-2, -1))


def _out_of_autocast(device_type: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device_type)  # not on the meta device
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _hidden_names(num_hidden_factors: int, concepts: Sequence[str]) -> list[str]:
    """`hidden_0` and so on; with more underscores where a concept is called that."""
    names = [f"hidden_{index}" for index in range(num_hidden_factors)]
    while set(names) & set(concepts):
        names = [name.replace("hidden", "hidden_") for name in names]
    return names


def _check_concepts(concepts: Sequence[str], obs_context: str) -> None:
    if not concepts:
        raise ValueError("`concepts` is empty; name at least one.")
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"`concepts` names one twice: {list(concepts)}.")
    if obs_context in concepts:
        raise ValueError(f"'{obs_context}' is the observational context and cannot be a concept as well.")


def _causal_layer(
    causal_form: str,
    concepts: Sequence[str],
    num_hidden_factors: int,
    dim: int,
    graph: Sequence[tuple[str, str]] | None,
) -> ReducedForm | Structural:
    if causal_form == "structural":
        edges = None if graph is None else _edges(graph, concepts, num_hidden_factors)
        return Structural(len(concepts), num_hidden_factors, dim, edges)
    if causal_form == "reduced_form":
        if graph is not None:
            raise ValueError("A reduced form takes no `graph`; use `causal_form='structural'`.")
        return ReducedForm(len(concepts), num_hidden_factors, dim)
    raise ValueError(f"Unknown causal_form '{causal_form}'; choose 'structural' or 'reduced_form'.")


def _edges(
    graph: Sequence[tuple[str, str]], concepts: Sequence[str], num_hidden_factors: int
) -> list[tuple[int, int]]:
    """Node indices of the named edges, with the default edges of hidden factors that the graph does not mention."""
    hidden = _hidden_names(num_hidden_factors, concepts)
    nodes = [*concepts, *hidden]
    graph = [(normal_name(cause), normal_name(effect)) for cause, effect in graph]
    unknown = sorted({name for edge in graph for name in edge} - set(nodes))
    if unknown:
        raise ValueError(f"`graph` names {unknown}; the nodes are {nodes}.")
    edges = [(nodes.index(cause), nodes.index(effect)) for cause, effect in graph]
    if not any(name in hidden for edge in graph for name in edge):
        edges += [(nodes.index(name), effect) for name in hidden for effect in range(len(concepts))]
    return edges
