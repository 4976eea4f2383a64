"""Random numbers keyed by seed, step and place in the global batch.

They depend neither on how many processes share the batch nor on what was drawn before, so that two processes train as
one does, and a resumed run as one that was never stopped.
"""

from __future__ import annotations

import torch


class KeyedNoise:
    """Random numbers of one step; each process gets the rows of its own share of the global batch.

    Args:
        seed: the run's seed.
        step: number of the batch, counted from the start of the run over gradient accumulation.
        process_index: this process.
        num_processes: all processes; each has a batch of the same size.
    """

    def __init__(self, seed: int, step: int, process_index: int = 0, num_processes: int = 1):
        # on the CPU, since each kind of device has random numbers of its own
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        self.process_index = process_index
        self.num_processes = num_processes

    def normal(self, batch_size: int, *shape: int) -> torch.Tensor:
        """Standard normal numbers (batch_size, *shape)."""
        return self._share(torch.randn(self.num_processes * batch_size, *shape, generator=self.generator))

    def uniform(self, batch_size: int) -> torch.Tensor:
        """Numbers in [0, 1), (batch_size,)."""
        return self._share(torch.rand(self.num_processes * batch_size, generator=self.generator))

    def _share(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.num_processes)[self.process_index]
