"""Random numbers keyed by seed, stream and step, and shared among processes by place in the global batch.

They depend neither on how many processes share the batch nor on what was drawn before: two processes train as one
does, and a resumed run as one that was never stopped.
"""

from __future__ import annotations

import torch

from ...keyed_random import keyed_generator


class KeyedNoise:
    """Random numbers of one step; each process gets the rows of its share of the global batch.

    Args:
        key: the run's seed, the name of the stream, and the step.
        process_index: this process.
        num_processes: number of processes; each has a batch of the same size.
    """

    def __init__(self, *key: int | str, process_index: int = 0, num_processes: int = 1):
        self.generator = keyed_generator(*key)
        self.process_index = process_index
        self.num_processes = num_processes

    def normal(self, batch_size: int, *shape: int) -> torch.Tensor:
        """Standard normal numbers (batch_size, *shape)."""
        return self._share(torch.randn(self.num_processes * batch_size, *shape, generator=self.generator))

    def uniform(self, batch_size: int, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), (batch_size, *shape)."""
        return self._share(torch.rand(self.num_processes * batch_size, *shape, generator=self.generator))

    def _share(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.num_processes)[self.process_index]
