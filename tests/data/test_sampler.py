from collections import Counter

import pytest
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from diffusers_ctx.data import ContextBalancedSampler


# interleaved, of sizes 7, 3, 2 and 1
CONTEXTS = ["obs", "night", "obs", "fog", "obs", "snow", "obs", "night", "obs", "snow", "obs", "obs", "night"]


def runs(order, length):
    return [order[start : start + length] for start in range(0, len(order), length)]


def shards(sampler, batch_size, processes, split_batches=False, drop_last=False):
    """The batches that each process gets from a data loader prepared by Accelerate."""
    loaders = []
    for process in range(processes):
        plain = DataLoader(range(len(CONTEXTS)), batch_size=batch_size, sampler=sampler, drop_last=drop_last)
        loaders.append(
            prepare_data_loader(
                plain,
                num_processes=processes,
                process_index=process,
                split_batches=split_batches,
                put_on_device=False,
            )
        )
    return loaders


def batches(loader):
    return [batch.tolist() for batch in loader]


def test_every_run_has_each_context_once():
    sampler = ContextBalancedSampler(CONTEXTS, seed=3)
    order = list(sampler)
    assert len(order) == len(sampler) == 4 * 7
    for run in runs(order, 4):
        assert {CONTEXTS[row] for row in run} == {"obs", "night", "fog", "snow"}
    orders = {tuple(CONTEXTS[row] for row in run) for run in runs(order, 4)}
    assert len(orders) > 1


def test_rows_are_seen_equally_often_within_a_context():
    counts = Counter(ContextBalancedSampler(CONTEXTS, seed=3))
    assert set(counts) == set(range(len(CONTEXTS)))
    for context, seen in {"obs": {1}, "night": {2, 3}, "snow": {3, 4}, "fog": {7}}.items():
        assert {counts[row] for row, name in enumerate(CONTEXTS) if name == context} == seen


def test_small_contexts_are_reshuffled_for_every_pass():
    contexts = ["obs"] * 60 + ["night"] * 6
    night = [row for row in ContextBalancedSampler(contexts, seed=0) if row >= 60]
    passes = runs(night, 6)
    assert all(sorted(rows) == list(range(60, 66)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 5


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler = ContextBalancedSampler(CONTEXTS, seed=5)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    other = ContextBalancedSampler(iter(CONTEXTS), seed=5)
    other.set_epoch(1)
    assert list(other) == second
    assert list(ContextBalancedSampler(CONTEXTS, seed=6)) not in (first, second)


def test_one_context():
    assert sorted(ContextBalancedSampler(["obs"] * 5)) == [0, 1, 2, 3, 4]


def test_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        ContextBalancedSampler([])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("split_batches", [False, True])
def test_processes_share_the_global_order(processes, split_batches):
    sampler = ContextBalancedSampler(CONTEXTS, seed=1)
    loaders = shards(sampler, 6 if split_batches else 2, processes, split_batches, drop_last=True)
    for epoch in (0, 1):  # prepared loaders count their epochs and pass them on
        sampler.set_epoch(epoch)
        order = list(sampler)
        sampler.set_epoch(99)
        per_process = [batches(loader) for loader in loaders]
        assert len({len(share) for share in per_process}) == 1
        union = [row for step in zip(*per_process) for batch in step for row in batch]
        assert len(union) >= len(order) - 6
        assert union == order[: len(union)]


def test_every_process_has_balanced_batches():
    loaders = shards(ContextBalancedSampler(CONTEXTS, seed=1), batch_size=4, processes=2, drop_last=True)
    for loader in loaders:
        shares = batches(loader)
        assert len(shares) == 3
        for batch in shares:
            assert {CONTEXTS[row] for row in batch} == set(CONTEXTS)


def test_last_batches_are_filled_from_the_start():
    sampler = ContextBalancedSampler(CONTEXTS, seed=1)
    order = list(sampler)
    first, second = (batches(loader) for loader in shards(sampler, batch_size=8, processes=2))
    assert [len(batch) for batch in first + second] == [8] * 4
    assert [*first[0], *second[0], *first[1], *second[1]] == order + order[:4]


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_inside_an_epoch_equals_never_having_stopped(processes):
    for process in range(processes):
        whole = shards(ContextBalancedSampler(CONTEXTS, seed=2), 4, processes)[process]
        epochs = [batches(whole) for _ in range(3)]
        resumed = shards(ContextBalancedSampler(CONTEXTS, seed=2), 4, processes)[process]
        resumed.set_epoch(1)
        assert batches(skip_first_batches(resumed, 2)) == epochs[1][2:]
        resumed.set_epoch(2)
        assert batches(resumed) == epochs[2]


def test_accelerator_keeps_the_sampler():
    sampler = ContextBalancedSampler(CONTEXTS, seed=4)
    order = list(sampler)
    loader = Accelerator(cpu=True).prepare(DataLoader(range(len(CONTEXTS)), batch_size=4, sampler=sampler))
    assert [row for batch in batches(loader) for row in batch] == order
    assert [row for batch in batches(loader) for row in batch] != order
    assert sampler.epoch == 1
