"""The method on two screens: learn two concepts from single interventions, then sample both interventions at once.

    python examples/minimal.py

A picture shows a landscape by its light (`night`) and its snow line (`snow`); when it is darker, more snow lies. There
are pictures of three contexts: observational, do(night) and do(snow). No value and no graph is given, and do(night,
snow) is never seen. The library does the same on latents, with more loss terms and a UNet instead of `paint`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss


CONTEXTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # masks of obs, do(night), do(snow)


def photograph(mask: torch.Tensor, n: int) -> torch.Tensor:
    """The world, unknown to the model: n pictures (n, 64) under the interventions of a mask (2,)."""
    z, (m_night, m_snow) = torch.randn(n, 2), mask
    night = (1 - m_night) * z[:, 0] + m_night * (1.2 + 0.5 * z[:, 0])
    snow = (1 - m_snow) * (0.8 * night + 0.6 * z[:, 1]) + m_snow * (-1.2 + 0.5 * z[:, 1])
    light = torch.sigmoid(-night)[:, None, None]
    cover = torch.sigmoid(2 * (snow[:, None, None] - torch.linspace(-2, 2, 8)[:, None]))
    return (light * (0.3 + 0.7 * cover + 0.1 * torch.linspace(0, 1, 8))).flatten(1)


class SCM(nn.Module):
    """Mechanisms `u = s(m) z + a(m)` and causal layer `c = u + (1 - m) * (A c)`, with one noise per concept."""

    def __init__(self, edges: torch.Tensor):
        super().__init__()
        self.log_scale, self.shift = (
            nn.Parameter(torch.zeros(2, 2)),
            nn.Parameter(torch.zeros(2, 2)),
        )  # (regime, concept)
        self.A = nn.Parameter(edges)

    def coefficients(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`log s(m)` and `a(m)` (C, 2), and `I - (1 - m) A` (C, 2, 2), for masks (C, 2)."""
        log_scale, shift = ((1 - masks) * x[0] + masks * x[1] for x in (self.log_scale, self.shift))
        return log_scale, shift, torch.eye(2) - (1 - masks)[:, :, None] * self.A * (1 - torch.eye(2))

    def sample(self, mask: torch.Tensor, n: int) -> torch.Tensor:
        """Values (n, 2) under the interventions of a mask (2,)."""
        log_scale, shift, unmix = self.coefficients(mask[None])
        return (log_scale.exp() * torch.randn(n, 2) + shift) @ torch.linalg.inv(unmix[0]).T

    def log_prob(self, c: torch.Tensor) -> torch.Tensor:
        """Log-density (n, 3) of values (n, 2) in each context, by a change of variables to the noise."""
        log_scale, shift, unmix = self.coefficients(CONTEXTS)
        z = (torch.einsum("kij,nj->nki", unmix, c) - shift) / log_scale.exp()
        return -(z**2).sum(2) / 2 - log_scale.sum(1) + torch.linalg.slogdet(unmix).logabsdet

    def penalty(self) -> torch.Tensor:
        """On cycles, and a little on edges."""
        return 10 * (self.A[0, 1] * self.A[1, 0]) ** 2 + 0.03 * (self.A[0, 1].abs() + self.A[1, 0].abs())


class Flow(nn.Module):
    """An invertible map from codes to concept values: affine couplings with a linear map before each."""

    def __init__(self, couplings: int = 4):
        super().__init__()
        self.rotations = nn.ParameterList(torch.linalg.qr(torch.randn(2, 2))[0] for _ in range(couplings))
        self.couplings = nn.ModuleList(mlp(1, 2) for _ in range(couplings))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (n, 2) and `log |det dc/dx|` (n,)."""
        log_volume = torch.zeros(len(x))
        for rotation, coupling in zip(self.rotations, self.couplings):
            x = x @ rotation
            log_scale, shift = coupling(x[:, :1]).unbind(1)
            x = torch.stack([x[:, 0], x[:, 1] * log_scale.tanh().exp() + shift], dim=1)
            log_volume = log_volume + torch.linalg.slogdet(rotation).logabsdet + log_scale.tanh()
        return x, log_volume


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))


def minimize(loss, parameters, steps: int, rate: float) -> float:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (value := loss()).backward()
        optimizer.step()
        schedule.step()
    return value.item()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced Wasserstein distance of two sets of pictures (n, 64)."""
    directions = nn.functional.normalize(torch.randn(64, 200), dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt().item()


def main(seed: int = 0, n: int = 2000) -> dict[str, float]:
    """Distances to true pictures of do(night, snow), and the learned edges."""
    torch.manual_seed(seed)
    pictures = torch.cat([photograph(mask, n) for mask in CONTEXTS])
    context = torch.arange(3).repeat_interleave(n)

    # 1. A code, learned without contexts.
    encode, decode = mlp(64, 2), mlp(2, 64)

    def reconstruction() -> torch.Tensor:
        x = pictures[torch.randint(len(pictures), (256,))]
        return mse_loss(decode(encode(x)), x)

    minimize(reconstruction, [*encode.parameters(), *decode.parameters()], 1000, 3e-3)
    with torch.no_grad():
        codes = encode(pictures)
        codes = (codes - codes.mean(0)) / codes.std(0)

    # 2. Where the concepts are in it: p(context | c), by Bayes' rule, is sharp only if each concept is at its node.
    def search(attempt: nn.ModuleList, steps: int) -> float:
        flow, scm = attempt

        def loss() -> torch.Tensor:
            row = torch.randint(len(codes), (512,))
            c, log_volume = flow(codes[row])
            log_prob = scm.log_prob(c)
            likelihood = log_prob.gather(1, context[row, None])[:, 0] + log_volume
            return cross_entropy(log_prob, context[row]) - 0.1 * likelihood.mean() + 0.1 * scm.penalty()

        return minimize(loss, attempt.parameters(), steps, 1e-2)

    attempts = [nn.ModuleList([Flow(), SCM(torch.zeros(2, 2))]) for _ in range(4)]
    best = min(attempts, key=lambda attempt: search(attempt, 150))  # from bad starts, a concept's sign is lost
    search(best, 600)
    with torch.no_grad():
        values = best[0](codes)[0]

    # 3. What causes what: the SCM again, by maximum likelihood on these values, the best of several starts.
    def fit(start: SCM) -> float:
        def loss() -> torch.Tensor:
            return start.penalty() - start.log_prob(values).gather(1, context[:, None]).mean()

        return minimize(loss, start.parameters(), 150, 1e-1)

    scm = min([SCM(0.3 * torch.randn(2, 2)) for _ in range(4)], key=fit)

    # 4. A generator of pictures from concept values: in the library, the diffusion model.
    paint = mlp(2, 64)

    def painting() -> torch.Tensor:
        row = torch.randint(len(values), (256,))
        return mse_loss(paint(values[row]), pictures[row])

    minimize(painting, paint.parameters(), 1000, 3e-3)

    # Compose: both intervened mechanisms, which no picture showed together.
    truth, again = (photograph(torch.ones(2), n) for _ in range(2))
    with torch.no_grad():
        composed = paint(scm.sample(torch.ones(2), n))
        obs, night, snow = values.split(n)
        added = paint(obs + (night.mean(0) - obs.mean(0)) + (snow.mean(0) - obs.mean(0)))
    return {
        "composed": distance(composed, truth),
        "two sets of true pictures": distance(again, truth),
        "shifts of the single interventions, added": distance(added, truth),
        "do(night) alone": distance(photograph(CONTEXTS[1], n), truth),
        "do(snow) alone": distance(photograph(CONTEXTS[2], n), truth),
        "edge night -> snow": scm.A[1, 0].abs().item(),
        "edge snow -> night": scm.A[0, 1].abs().item(),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:45}{value:.3f}")
