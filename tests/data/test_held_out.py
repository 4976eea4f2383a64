import pytest

from diffusers_ctx.data.held_out import split_held_out


CONTEXTS = ["snow"] * 4 + ["obs"] * 9 + ["night+snow"] * 5 + ["night"] * 6


def test_halves_are_disjoint_equal_and_of_their_own_context():
    halves = split_held_out(CONTEXTS, ["night", "snow"])
    assert [(name, half.interventions) for name, half in halves.items()] == [
        ("obs", ()),
        ("night", ("night",)),
        ("snow", ("snow",)),
        ("night+snow", ("night", "snow")),
    ]
    for (name, half), n in zip(halves.items(), (4, 3, 2, 2)):
        assert len(half.real) == len(half.real_b) == n
        rows = {*half.real, *half.real_b}
        assert len(rows) == 2 * n and {CONTEXTS[row] for row in rows} == {name}


def test_the_split_is_random_and_depends_on_the_context_and_the_seed_alone():
    contexts = ["obs"] * 200 + ["night"] * 200
    half = split_held_out(contexts, ["night"])["obs"]
    assert 80 < sum(half.real) / len(half.real) < 120  # not the first half, nor the last
    assert split_held_out([*contexts, *["snow"] * 8], ["night", "snow"])["obs"] == half
    assert split_held_out(contexts, ["night"], seed=1)["obs"] != half


def test_fewer_images_are_the_first_of_more():
    all_images, some = (split_held_out(CONTEXTS, ["night", "snow"], max_images=n)["obs"] for n in (None, 2))
    assert some.real == all_images.real[:2] and some.real_b == all_images.real_b[:2]


@pytest.mark.parametrize(
    ("contexts", "concepts", "message"),
    [
        (["obs"] * 4 + ["snow"] * 3, ["snow"], "'snow' has 3 images"),
        (["obs"] * 4 + ["snow+fog"] * 4, ["snow"], r"'snow\+fog' intervenes on 'fog'; known are \['snow'\]"),
    ],
)
def test_contexts_that_cannot_be_measured(contexts, concepts, message):
    with pytest.raises(ValueError, match=message):
        split_held_out(contexts, concepts)
