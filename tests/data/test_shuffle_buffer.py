"""A shuffle buffer: runs in a random order, and a place that can be saved."""

from typing import Any

import pytest

from diffusers_ctx.data.shuffle_buffer import ShuffleBuffer


class Numbers:
    """0, 1, ... up to an end; how many were read is its place."""

    def __init__(self, end: int):
        self.end = end
        self.read = 0

    def __iter__(self) -> "Numbers":
        return self

    def __next__(self) -> int:
        if self.read == self.end:
            raise StopIteration
        self.read += 1
        return self.read - 1

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.read = state_dict["read"]


def test_each_run_is_shuffled_and_nothing_is_lost():
    shuffled = list(ShuffleBuffer(Numbers(10), 4, (0,)))
    runs = [shuffled[:4], shuffled[4:8], shuffled[8:]]
    assert [sorted(run) for run in runs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert any(run != sorted(run) for run in runs)
    assert shuffled == list(ShuffleBuffer(Numbers(10), 4, (0,)))
    assert shuffled != list(ShuffleBuffer(Numbers(10), 4, (1,)))


def test_the_next_run_is_read_an_item_at_a_time():
    source = Numbers(100)
    buffer = ShuffleBuffer(source, 4, (0,))
    read = []
    for _ in range(9):
        next(buffer)
        read.append(source.read)
    assert read == [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("taken", range(12))
def test_it_continues_from_every_place(taken):
    buffer = ShuffleBuffer(Numbers(11), 4, (3, 1))
    for _ in range(min(taken, 11)):
        next(buffer)
    if taken == 11:
        assert not buffer.fill()
    place, rest = buffer.state_dict(), list(buffer)
    other = ShuffleBuffer(Numbers(11), 4, (3, 1))
    other.load_state_dict(place)
    assert list(other) == rest and len(rest) == 11 - min(taken, 11)


def test_saving_a_place_changes_nothing_and_a_place_may_be_saved_again():
    buffer, undisturbed = (ShuffleBuffer(Numbers(11), 4, (0,)) for _ in range(2))
    for number in undisturbed:
        place = buffer.state_dict()
        buffer = ShuffleBuffer(Numbers(11), 4, (0,))
        buffer.load_state_dict(place)
        assert buffer.state_dict() == place and next(buffer) == number


def test_a_source_that_has_become_shorter():
    buffer = ShuffleBuffer(Numbers(8), 8, (0,))
    for _ in range(6):
        next(buffer)
    with pytest.raises(ValueError, match="fewer items than when its place was saved"):
        ShuffleBuffer(Numbers(5), 8, (0,)).load_state_dict(buffer.state_dict())


def test_an_empty_source():
    assert list(ShuffleBuffer(Numbers(0), 4, (0,))) == [] and not ShuffleBuffer(Numbers(0), 4, (0,)).fill()
