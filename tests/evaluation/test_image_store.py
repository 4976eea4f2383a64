"""Images of an evaluation on disk: what is damaged is made again."""

import numpy as np
import pytest
from accelerate import Accelerator

from diffusers_ctx.evaluation.image_store import ImageJob, check_settings, make_images, write_settings


@pytest.fixture
def job(tmp_path) -> ImageJob:
    made = []

    def produce(indices: list[int]) -> np.ndarray:
        made.append(indices)
        return np.stack([np.full((8, 8, 3), index, np.uint8) for index in indices])

    job = ImageJob(tmp_path / "samples", 4, produce)
    job.made = made
    make_images([job], 2, Accelerator(cpu=True), "Images")
    return job


@pytest.mark.parametrize("size", [0, 20, -5])
def test_a_damaged_image_is_made_again(job, size):
    assert job.made == [[0, 1], [2, 3]]
    make_images([job], 2, Accelerator(cpu=True), "Images")
    assert len(job.made) == 2
    file = job.path(3)
    file.write_bytes(file.read_bytes()[:size])
    make_images([job], 2, Accelerator(cpu=True), "Images")
    assert job.made[2:] == [[2, 3]] and job.images()[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[1]"])
def test_damaged_settings_are_named(job, tmp_path, content):
    write_settings(tmp_path, {"seed": 0})
    check_settings(tmp_path, {"seed": 0})
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*; choose another folder, or delete"):
        check_settings(tmp_path, {"seed": 0})
