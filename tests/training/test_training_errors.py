"""What cannot work stops before anything is computed or written, with one message that names the fix."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from diffusers_ctx import ComposablePipeline

from .conftest import WITHOUT_SEARCH, create_stage, create_trainer, encoded_trainer, files_in, make_options
from .test_training_script import ADAPTER_WEIGHTS, weights_of


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


@pytest.fixture(scope="module")
def finished_run(base_model, photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "adapter"
    return create_trainer(make_options(base_model, photos, folder, checkpointing_steps=2, **WITHOUT_SEARCH)).train()


@pytest.fixture
def trained(options, finished_run) -> None:
    """The run of `options` has ended, and left a checkpoint."""
    shutil.copytree(finished_run, options["output_dir"])


@pytest.fixture
def own_photos(photos, tmp_path, options):
    """Photos that a test may spoil."""
    root = shutil.copytree(photos, tmp_path / "photos")
    options["train_data_dir"] = str(root)
    return root


@pytest.fixture
def refuses(options, tmp_path):
    """Asserts the error of a run with changed options, and that it left nothing on disk."""

    def check(error: type[Exception], message: str, **changes) -> None:
        before = files_in(tmp_path)
        with pytest.raises(error, match=message):
            encoded_trainer(options | changes)
        assert files_in(tmp_path) == before

    return check


def test_the_same_options_unspoilt_are_accepted(options):
    trainer = encoded_trainer(options)
    assert trainer.max_train_steps == 2 and len(trainer.latents) == 18


def test_what_was_found_is_printed(options, own_photos, capsys):
    (own_photos / "snow" / "metadata.csv").unlink()
    encoded_trainer(options | {"concepts": ["snow", "night"], "validation_images": 1})
    line = "Images (captions) by context: night 6 (6), obs 7 (7), snow 5 (0). Concepts: snow, night.\n"
    assert line in capsys.readouterr().out


# the base model's size


@pytest.mark.parametrize("size", [(16, 16), [16, 16], 16])
def test_a_base_for_squares_trains_at_its_size(options, size):
    trainer = create_trainer(options | {"resolution": None, "validation_prompt": "a", "num_validation_images": 1})
    trainer.pipeline.unet.register_to_config(sample_size=size)
    adapter = trainer.train()
    assert trainer.resolution == 32 and trainer.latents.mean.shape[-2:] == (16, 16)
    trainer.pipeline.unload_context_adapter()
    trainer.pipeline.load_context_adapter(adapter)
    assert trainer.pipeline("a", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("size", [None, (16, 24), (None, None)])
def test_a_base_of_another_size_takes_a_resolution(options, size):
    trainer = create_trainer(options | {"resolution": None})
    trainer.pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match=re.escape(f"`sample_size` {size}") + ".*give `resolution`"):
        trainer.load()
    trainer = create_trainer(options | {"validation_prompt": "a", "num_validation_images": 1})
    trainer.pipeline.unet.register_to_config(sample_size=size)
    trainer.train()
    assert trainer.pipeline("a", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


# data


def test_a_missing_observational_context(refuses, own_photos):
    shutil.rmtree(own_photos / "obs")
    refuses(ValueError, "no observational context 'obs'; found .*'night', 'snow'.*obs_context")


def test_an_unreadable_image(refuses, own_photos, options):
    path = own_photos / "snow" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    refuses(ValueError, r"1 of 18 images cannot be read: .*snow/3\.png.*skip_unreadable")
    with pytest.warns(UserWarning, match=r"snow/3\.png.*left out"):
        assert len(encoded_trainer(options | {"skip_unreadable": True}).latents) == 17


def test_an_empty_context(refuses, own_photos):
    (own_photos / "fog").mkdir()
    refuses(ValueError, "fog holds no images")


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (["night", "snow", "night"], r"\['night'\] are named more than once"),
        (["night", "sleet"], r"choose one or more of \['night', 'snow'\]"),
    ],
)
def test_concepts_that_cannot_be(refuses, concepts, message):
    refuses(ValueError, message, concepts=concepts)


def test_a_folder_or_a_dataset_and_not_both_or_neither(refuses, parquet):
    message = "either `train_data_dir` or `dataset_name`"
    refuses(ValueError, message, dataset_name=str(parquet))
    refuses(ValueError, message, train_data_dir=None)
    refuses(FileNotFoundError, "nowhere", train_data_dir="/nowhere")


def test_a_batch_larger_than_an_epoch(refuses):
    refuses(ValueError, "21 images, fewer than the 22 of a step; lower `train_batch_size`", train_batch_size=22)


def test_too_few_epochs_for_one_step(refuses):
    changes = {"max_train_steps": None, "num_train_epochs": 1, "gradient_accumulation_steps": 6}
    refuses(ValueError, "1 epochs of 5 batches make no step of 6 batches; raise `num_train_epochs`", **changes)


# options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 33}, "`resolution` is 33; this model needs a multiple of 2"),
        ({"lr_warmup_steps": 5}, "`lr_warmup_steps` is 5, and .* `constant` has no .*to constant_with_warmup"),
        ({"report_to": "notebook"}, "`report_to` is 'notebook', and no tracker .* choose one of .*'tensorboard'"),
        ({"graph": ["snow->nigth"]}, r"`graph` names \['nigth'\]; the nodes are \['night', 'snow'"),
        (
            {"validation_interventions": ["night+sleet"], "validation_prompt": "a street"},
            "`validation_interventions` .*'sleet'; known are .*'snow'",
        ),
        (
            {"validation_interventions": ["night+"], "validation_prompt": "a street"},
            "`validation_interventions` .*'night[+]'",
        ),
        ({"posterior_encoder": "unet", "mode": "full"}, "In mode full the UNet changes.*choose mode frozen or lora"),
        ({"posterior_encoder": "clip"}, "no image encoder of its own; name a CLIP model by `posterior_encoder_model`"),
        (
            {"posterior_encoder": "unet", "posterior_encoder_model": "x"},
            "`posterior_encoder` is unet; set it to clip, or leave the model out",
        ),
        ({"posterior_encoder_model": "nowhere"}, "'nowhere' cannot be loaded; give the"),
    ],
)
def test_options_that_cannot_work(refuses, changes, message):
    refuses(ValueError, message, **changes)


def test_gradients_may_be_left_as_they_are(options):
    assert encoded_trainer(options | {"max_grad_norm": "inf"}).config.optimization.max_grad_norm == float("inf")


@pytest.mark.parametrize(("scheduler", "warm_up"), [("cosine", 2), ("constant_with_warmup", None)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(options, caplog, scheduler, warm_up):
    changes = {"lr_scheduler": scheduler, "lr_warmup_steps": warm_up}
    encoded_trainer(options | changes)
    assert f"grows for {warm_up or 500} steps, and the run has 2:" in caplog.text
    caplog.clear()
    encoded_trainer(options | changes | {"max_train_steps": 501})
    encoded_trainer(options)
    assert "grows for" not in caplog.text


def test_half_precision_without_a_gpu(refuses):
    refuses(ValueError, "fp16 needs a GPU; on a CPU set `mixed_precision` to bf16 or no", mixed_precision="fp16")


def test_a_base_whose_unet_sees_more_than_latents(refuses, base_model, tmp_path):
    pipeline = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    inpainting = dict(pipeline.unet.config) | {"in_channels": 9}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(inpainting))
    pipeline.save_pretrained(tmp_path / "inpainting")
    message = "UNet takes 9 channels, and its autoencoder makes 4: .* choose a text-to-image checkpoint"
    refuses(ValueError, message, pretrained_model_name_or_path=str(tmp_path / "inpainting"))


def test_a_folder_that_cannot_be_written_to(refuses, tmp_path):
    (tmp_path / "taken").write_text("a file")
    refuses(OSError, "`output_dir` .*taken cannot be written to .*choose another", output_dir=str(tmp_path / "taken"))


def test_a_checkpoint_that_is_not_there(refuses, options, tmp_path):
    refuses(FileNotFoundError, "no checkpoint 'checkpoint-7'", resume_from_checkpoint="checkpoint-7")


def test_a_checkpoint_beyond_the_run(refuses, tmp_path):
    (tmp_path / "adapter" / "checkpoint-3").mkdir(parents=True)
    refuses(ValueError, "checkpoint-3 is beyond the 2 steps of this run", resume_from_checkpoint="latest")


@pytest.mark.usefixtures("trained")
def test_checkpoints_of_an_earlier_run(refuses):
    refuses(ValueError, "adapter has checkpoints of an earlier run, such as checkpoint-2; go on .* latest`, choose")


@pytest.mark.usefixtures("trained")
def test_going_on_with_other_options_or_images(refuses, options, own_photos):
    changes = {"resume_from_checkpoint": "latest", "learning_rate": 0.5, "seed": 9}
    refuses(
        ValueError, "`learning_rate` was .* and is 0.5, `seed` was 0 and is 9. Resume with the same ones", **changes
    )
    encoded_trainer(options | {"resume_from_checkpoint": "latest", "max_train_steps": 3, "cache_latents": True})
    shutil.rmtree(own_photos / "snow")
    message = "`images` was {'night': 6, 'obs': 7, 'snow': 5} and is {'night': 6, 'obs': 7}"
    refuses(ValueError, message, resume_from_checkpoint="latest")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("what", ["image", "caption", "order"])
def test_going_on_with_as_many_other_images_or_captions(refuses, options, own_photos, what):
    shutil.move(own_photos, elsewhere := own_photos.with_name("elsewhere"))
    changes = {"train_data_dir": str(elsewhere), "resume_from_checkpoint": "latest", "max_train_steps": 3}
    encoded_trainer(options | changes)
    captions = elsewhere / "night" / "metadata.csv"
    if what == "image":
        (elsewhere / "night" / "3.png").write_bytes((elsewhere / "night" / "2.png").read_bytes())
    elif what == "caption":
        captions.write_text(captions.read_text().replace("a street number 3", "a house number 3"))
    else:  # the same pictures in each context, of which two have changed places
        (elsewhere / "night" / "3.png").rename(elsewhere / "night" / "4th.png")
        captions.write_text(captions.read_text().replace("3.png", "4th.png"))
    message = "other options: images, captions or their order have changed. Resume with the same ones"
    refuses(ValueError, message, **changes)


@pytest.mark.usefixtures("trained")
def test_going_on_with_images_from_a_table_of_the_same_files(options, parquet):
    changes = {"train_data_dir": None, "dataset_name": str(parquet), "resume_from_checkpoint": "latest"}
    assert encoded_trainer(options | changes).checkpoint is not None


@pytest.mark.usefixtures("trained")
def test_going_on_with_another_base_model(refuses, options, tmp_path):
    other = ComposablePipeline.from_pretrained(options["pretrained_model_name_or_path"], safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        weight = next(getattr(other, name).parameters())
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.01)
        other.save_pretrained(tmp_path / name)
        weight.data = before
        changes = {"pretrained_model_name_or_path": str(tmp_path / name), "resume_from_checkpoint": "latest"}
        refuses(ValueError, r"`weights of the base model` was \w+ and is \w+. Resume with the same ones", **changes)


def test_a_run_that_becomes_longer_keeps_to_when_the_unet_was_to_learn(options, caplog):
    plan = options | {"unfreeze_after": 0.5, "max_train_steps": 4, "checkpointing_steps": 4}
    create_trainer(plan).train()
    longer = encoded_trainer(plan | {"resume_from_checkpoint": "latest", "max_train_steps": 9})
    assert longer.contract["unfreeze_step"] == 2 and not [line for line in caplog.messages if "learning rate" in line]
    create_trainer(plan | {"output_dir": options["output_dir"] + "2", "lr_scheduler": "cosine"}).train()
    changes = {"output_dir": options["output_dir"] + "2", "lr_scheduler": "cosine", "resume_from_checkpoint": "latest"}
    encoded_trainer(plan | changes | {"max_train_steps": 9})
    assert "a run of 9 steps, and not of 4 as before: the schedule 'cosine'" in caplog.text


def test_the_latest_checkpoint_of_a_run_that_has_none_is_its_beginning(options, caplog):
    trainer = encoded_trainer(options | {"resume_from_checkpoint": "latest"})
    assert trainer.checkpoint is None and "training starts from the beginning" in caplog.text


def test_no_token_to_push_with(refuses, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refuses(huggingface_hub.errors.LocalTokenNotFoundError, "hf auth login.*--hub_token", push_to_hub=True)


# in training


def test_a_loss_that_is_not_finite_writes_no_adapter(options, tmp_path):
    output_dir = tmp_path / "adapter"
    diverging = options | {"learning_rate": 1e30}
    create_trainer(diverging | {"checkpointing_steps": 1, "max_train_steps": 1}).train()
    (output_dir / "context_adapter_config.json").unlink()
    before = files_in(output_dir)
    trainer = create_trainer(diverging | {"max_train_steps": 9, "resume_from_checkpoint": "latest"})
    with pytest.raises(FloatingPointError, match=r"at step \d.*`learning_rate`.*last checkpoint is .*checkpoint-1"):
        trainer.train()
    assert files_in(output_dir) == before


def test_a_loss_that_is_not_finite_leaves_what_was_learned_of_the_concepts(options, tmp_path):
    trainer = create_trainer(options | {"learning_rate": 1e30, "max_train_steps": 9})
    with pytest.raises(FloatingPointError, match=r"The last checkpoint is .*checkpoint-0"):
        trainer.train()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["checkpoint-0"]


def test_gradients_that_are_not_finite_change_nothing(options, tmp_path):
    stage = create_stage(encoded_trainer(options))
    before = [parameter.detach().clone() for parameter in stage.parameters]
    stage.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"The norm of the gradients is (inf|nan) at step 0\. Lower `learning_rate`"
    ):
        next(stage.steps())
    assert all(torch.equal(a, b) for a, b in zip(before, stage.parameters))
    assert set(files_in(tmp_path / "adapter")) == set()


def test_a_validation_that_fails_in_the_end_takes_nothing_with_it(options, monkeypatch):
    run = options | {"validation_prompt": "a street", "num_validation_images": 1}
    undisturbed = weights_of(create_trainer(run | {"output_dir": options["output_dir"] + "-undisturbed"}).train())
    trainer = create_trainer(run)
    monkeypatch.setattr(trainer.pipeline.vae, "decode", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    got = weights_of(create_trainer(run | {"resume_from_checkpoint": "latest"}).train())
    assert got.keys() == undisturbed.keys() and all(torch.equal(got[name], undisturbed[name]) for name in got)


def out_of_memory(*arguments, **keywords):
    raise RuntimeError("out of memory")


def test_concepts_that_are_not_learned_to_a_finite_loss(options, tmp_path):
    diverging = {"posterior_type": "inverse", "concept_learning_rate": 1e30, "concept_steps": 20}
    trainer = create_trainer(options | diverging)
    with pytest.raises(FloatingPointError, match="learning the concepts; lower `concept_learning_rate`"):
        trainer.train()
    assert files_in(tmp_path / "adapter") == {}


# room on the disk


@pytest.fixture(scope="module")
def sizes(base_model, photos, tmp_path_factory) -> SimpleNamespace:
    """Bytes of the tensors in a checkpoint (concepts, weights that learn, their average and two moments of AdamW), and
    in the final adapter."""
    changes = {"unfreeze_after": 0.0, "max_train_steps": 1, "use_ema": True, **WITHOUT_SEARCH}
    output_dir = create_trainer(make_options(base_model, photos, tmp_path_factory.mktemp("sizes"), **changes)).train()
    learned = numbers_in_optimizer(output_dir)
    weights = size_of(output_dir / "checkpoint-1" / "trained.safetensors")
    adapter = sum(size_of(output_dir / name) for name in ADAPTER_WEIGHTS)
    return SimpleNamespace(checkpoint=weights + 12 * learned, adapter=adapter)


def numbers_in_optimizer(output_dir: Path) -> int:
    state = torch.load(output_dir / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
    return sum(moments["exp_avg"].numel() for moments in state.values())


def size_of(file: Path) -> int:
    return sum(tensor.nbytes for tensor in safetensors.torch.load_file(file).values())


@pytest.fixture
def free(monkeypatch):
    def have(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    return have


RUN = {"use_ema": True, "max_train_steps": 6, "checkpointing_steps": 2}


def test_a_full_disk_is_noticed_before(refuses, options, sizes, free):
    free(sizes.checkpoint + sizes.adapter - 1)
    refuses(OSError, "GB free; a checkpoint takes .* and the final adapter .* Free some, or choose another", **RUN)
    free(sizes.checkpoint + sizes.adapter)
    encoded_trainer(options | RUN)


def test_what_a_run_that_died_has_left_is_removed_before_room_is_looked_for(options, sizes, tmp_path, monkeypatch):
    leftover = tmp_path / "adapter" / "unfinished-checkpoint-2"
    leftover.mkdir(parents=True)
    room = 2 * sizes.checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if leftover.exists() else room))
    trainer = create_trainer(options | RUN)
    trainer.load()
    with trainer.open():
        pass
    assert set(files_in(trainer.output_dir)) == set()


def test_the_whole_pipeline_of_mode_full_needs_room_too(refuses, options, tmp_path, free):
    run = {"mode": "full", "unfreeze_after": 0.0, "max_train_steps": 1}
    folder = create_trainer(options | run | {"output_dir": str(tmp_path / "earlier")}).train()
    moments = 8 * numbers_in_optimizer(folder)
    saved = [file for file in folder.rglob("*.safetensors") if file.parent.name != "checkpoint-0"]
    needed = moments + sum(map(size_of, saved))
    free(0.99 * needed)
    refuses(OSError, "GB free; a checkpoint takes", **run)
    free(1.01 * needed)
    encoded_trainer(options | run)


@pytest.mark.parametrize(("changes", "count"), [({}, 3), ({"checkpoints_total_limit": 1}, 2)])
def test_checkpoints_that_do_not_all_fit_are_warned_of(options, sizes, free, caplog, changes, count):
    needed = count * sizes.checkpoint + sizes.adapter
    free(needed)
    encoded_trainer(options | RUN | changes)
    assert "do not fit" not in caplog.text
    free(needed - 1)
    encoded_trainer(options | RUN | changes)
    assert f"{count} checkpoints of" in caplog.text and "do not fit; lower `checkpoints_total_limit`" in caplog.text


def test_a_run_that_goes_on_needs_room_for_what_is_left(options, sizes, free, caplog):
    run = options | {"use_ema": True, "max_train_steps": 2, "checkpointing_steps": 2}
    create_trainer(run).train()
    free(2 * sizes.checkpoint + sizes.adapter)
    encoded_trainer(run | {"resume_from_checkpoint": "latest", "max_train_steps": 6})
    assert "do not fit" not in caplog.text
    encoded_trainer(run | {"resume_from_checkpoint": "latest", "max_train_steps": 8})
    assert "3 checkpoints of" in caplog.text and "do not fit" in caplog.text
