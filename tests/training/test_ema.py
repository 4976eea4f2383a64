"""The average that is saved is the formula's."""

import pytest
import torch

from .conftest import WITHOUT_SEARCH, create_stage, create_trainer, encoded_trainer


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


def test_what_is_saved_is_the_moving_average_of_the_weights(options):
    trainer = encoded_trainer(options | {"max_train_steps": 6, "use_ema": True, "ema_decay": 0.6})
    stage = create_stage(trainer)

    def weights() -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in stage.parameters]

    history = [weights(), *(weights() for _ in stage.steps())]
    stage.finish()
    expected = history[0]
    for step, weights in enumerate(history[1:]):
        # EMAModel's warm-up: the first average is the first step's weights
        decay = 0.0 if step == 0 else min(0.6, 1 - (1 + step) ** (-2 / 3))
        expected = [decay * average + (1 - decay) * weight for average, weight in zip(expected, weights)]
    assert len(history) == 7
    for parameter, average in zip(stage.parameters, expected):
        torch.testing.assert_close(parameter.detach(), average)
    assert any((average - last).abs().max() > 1e-3 for average, last in zip(expected, history[-1]))


@pytest.mark.parametrize("use_ema", [False, True])
def test_validation_leaves_the_weights_as_they_are(options, use_ema):
    trainer = create_trainer(options | {"use_ema": use_ema, "validation_prompt": "a street", "validation_steps": 9})
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.adapter_stage.parameters:
            parameter.add_(1)  # now they differ from their average
    before = [parameter.detach().clone() for parameter in trainer.adapter_stage.parameters]
    trainer.validate(2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.adapter_stage.parameters))
