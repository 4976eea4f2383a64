"""Noise that a seed gives in addition to the diffusion noise, which it leaves unchanged."""

from __future__ import annotations

import torch


def fork_generator_randn(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Standard normal noise that depends on the generator's state but does not advance it.

    A copy of the generator provides a seed. The noise itself is not drawn from the copy, which would give the same
    numbers as the diffusion noise.

    Raises:
        ValueError: if there are several generators, but not one for each row.
    """
    if generator is None:
        return torch.randn(shape)
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"`generator` has {len(generator)} entries for {shape[0]} images.")
        return torch.cat([fork_generator_randn((1, *shape[1:]), one) for one in generator])
    copy = torch.Generator(device=generator.device)
    copy.set_state(generator.get_state())
    seed = torch.randint(2**62, (), generator=copy, device=generator.device).item()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
