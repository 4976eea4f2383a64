"""The method on two screens: learn two concepts from single interventions, then sample both interventions at once.

    python examples/minimal.py

A picture shows a landscape by its light (`night`) and its snow line (`snow`); when it is darker, more snow lies. There
are pictures of three contexts: observational, do(night) and do(snow). No value and no graph is given, and do(night,
snow) is never seen. The library does the same on latents, with more loss terms and a UNet instead of `paint`.
"""

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy, mse_loss, nll_loss, normalize


CONTEXTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # masks m of obs, do(night), do(snow)
N = 2000  # pictures of each


def photograph(mask: Tensor) -> Tensor:
    """The world, unknown to the model: pictures (N, 64) under the interventions of a mask (2,)."""
    z = torch.randn(2, N, 1, 1)
    night = 1.2 + 0.5 * z[0] if mask[0] else z[0]
    snow = -1.2 + 0.5 * z[1] if mask[1] else 0.8 * night + 0.6 * z[1]
    cover = torch.sigmoid(2 * (snow - torch.linspace(-2, 2, 8)[:, None]))
    return (torch.sigmoid(-night) * (0.3 + 0.7 * cover + 0.1 * torch.linspace(0, 1, 8))).flatten(1)


class SCM(nn.Module):
    """A structural causal model: mechanisms `u = s(m) z + a(m)` of noise `z`, then `c = u + (1 - m) * (A c)`."""

    def __init__(self):
        super().__init__()
        self.log_s, self.a = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))  # (regime, concept)
        self.edges = nn.Parameter(0.3 * torch.randn(2))  # snow -> night, night -> snow

    def forward(self, mask: Tensor) -> MultivariateNormal:
        """The distributions of the concepts' values `c` under masks (..., 2)."""
        log_s, a = ((1 - mask) * x[0] + mask * x[1] for x in (self.log_s, self.a))
        mix = torch.linalg.inv(torch.eye(2) - (1 - mask)[..., None] * self.edges.diag().fliplr())
        scale = mix * log_s.exp()[..., None, :]
        return MultivariateNormal((mix @ a[..., None])[..., 0], scale @ scale.mT)


class Flow(nn.ModuleList):
    """An invertible map from codes to values: affine couplings, each of which changes one number by the other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n, 2) of codes (n, 2), and `log |det dc/dx|` (n,)."""
        log_det = torch.zeros(len(x))
        for coupling in self:
            log_scale, shift = coupling(x[:, :1]).unbind(1)
            x = torch.stack([x[:, 1] * log_scale.tanh().exp() + shift, x[:, 0]], dim=1)
            log_det = log_det + log_scale.tanh()
        return x, log_det


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))


def minimize(loss, model: nn.Module, steps: int, rate: float) -> float:
    """Minimizes a loss of rows on batches of them; returns that of all rows."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(3 * N, (256,))).backward()
        optimizer.step()
        schedule.step()
    return loss(torch.arange(3 * N)).item()


def distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein distance of two sets of pictures (N, 64)."""
    directions = normalize(torch.randn(64, 200), dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt().item()


def main(seed: int = 0) -> dict[str, float]:
    """Distances to true pictures of do(night, snow), and the learned edges."""
    torch.manual_seed(seed)
    pictures, context = torch.cat([photograph(mask) for mask in CONTEXTS]), torch.arange(3).repeat_interleave(N)

    # 1. A code, learned without contexts.
    autoencoder = nn.Sequential(encode := mlp(64, 2), mlp(2, 64))
    minimize(lambda row: mse_loss(autoencoder(pictures[row]), pictures[row]), autoencoder, 1000, 3e-3)
    codes = encode(pictures).detach()
    codes = (codes - codes.mean(0)) / codes.std(0)

    # 2. Where the concepts are in it: p(context | c), by Bayes' rule, is sharp only if each concept is at its node.
    def loss(scm: SCM, c: Tensor, row: Tensor, contrast: float) -> Tensor:
        log_prob = scm(CONTEXTS).log_prob(c[:, None])
        penalty = 10 * scm.edges.prod() ** 2 + 0.03 * scm.edges.abs().sum()  # on cycles, and a little on edges
        return contrast * cross_entropy(log_prob, context[row]) + nll_loss(log_prob, context[row]) + penalty

    def flow_loss(flow: Flow, scm: SCM, row: Tensor) -> Tensor:
        c, log_det = flow(codes[row])
        return loss(scm, c, row, contrast=10) - log_det.mean()

    def search(attempt: nn.ModuleList, steps: int = 150) -> float:
        return minimize(lambda row: flow_loss(*attempt, row), attempt, steps, 1e-2)

    best = min((nn.ModuleList([Flow(mlp(1, 2) for _ in range(4)), SCM()]) for _ in range(4)), key=search)
    search(best, 600)  # from bad starts, a concept's sign is lost
    values = best[0](codes)[0].detach()

    # 3. What causes what: the causal model again, by maximum likelihood on these values, the best of several starts.
    def fit(scm: SCM) -> float:
        return minimize(lambda row: loss(scm, values[row], row, contrast=0), scm, 150, 1e-1)

    scm = min([SCM() for _ in range(4)], key=fit)

    # 4. A generator of pictures from values: in the library, the diffusion model.
    paint = mlp(2, 64)
    minimize(lambda row: mse_loss(paint(values[row]), pictures[row]), paint, 1000, 3e-3)

    # Compose: both intervened mechanisms, which no picture showed together.
    both = torch.ones(2)
    obs, night, snow = values.split(N)
    sets = {
        "composed": paint(scm(both).sample((N,))),
        "two sets of true pictures": photograph(both),
        "shifts of the single interventions, added": paint(obs + night.mean(0) + snow.mean(0) - 2 * obs.mean(0)),
        "do(night) alone": photograph(CONTEXTS[1]),
        "do(snow) alone": photograph(CONTEXTS[2]),
    }
    truth, (backward, forward) = photograph(both), scm.edges.abs().tolist()
    found = {name: distance(pictures, truth) for name, pictures in sets.items()}
    return found | {"edge night -> snow": forward, "edge snow -> night": backward}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:45}{value:.3f}")
