"""The order in which a training run sees images in contexts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..keyed_random import keyed_seed


class ContextBalancedSampler(Sampler[int]):
    """Yields rows such that every run of `num_contexts` of them has each context once, in a random order.

    Batches are therefore balanced and mixed, whatever the contexts' sizes. An epoch shows the largest context once,
    and smaller ones as often as it takes, each reshuffled for every pass: `num_contexts` times the largest size. It
    depends on `(seed, epoch)` alone and neither on the process nor on the state of any generator.

    It yields the order of all processes together. `accelerator.prepare(dataloader)` keeps the sampler, hands each
    process its share of the batches, and sets the epoch whenever the data loader is iterated; on a plain data loader
    call `set_epoch` yourself. With `drop_last=False` Accelerate fills the last batches up with the epoch's first rows.

    To resume inside an epoch skip the batches already seen. Set the epoch first, through the data loader, since the
    one that skips does not pass it on in several processes:

        dataloader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(dataloader, batches_seen): ...

    Args:
        contexts: the context of every row of the dataset.
        seed: seed of the order.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, contexts: Iterable[str], seed: int = 0):
        names, codes = np.unique(list(contexts), return_inverse=True)
        if not len(names):
            raise ValueError("`contexts` is empty; a sampler needs at least one row.")
        self.num_contexts = len(names)
        self.seed = seed
        self.epoch = 0
        self._rows = [np.flatnonzero(codes == code) for code in range(len(names))]
        self._rounds = max(map(len, self._rows))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_contexts * self._rounds

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(keyed_seed(self.seed, "order", self.epoch))
        order = np.stack([self._shuffled_passes(rows, rng) for rows in self._rows], axis=1)
        yield from rng.permuted(order, axis=1).ravel().tolist()

    def _shuffled_passes(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        passes = -(-self._rounds // len(rows))
        return np.concatenate([rng.permutation(rows) for _ in range(passes)])[: self._rounds]
