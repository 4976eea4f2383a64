"""Training in several processes: with weights in shards, with a last batch that does not go round, and one that fails.

By `accelerate launch`, in two processes on the CPU, with the configurations of `train_scripts/configs/`.
"""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from diffusers_ctx.training import parse_training_config
from diffusers_ctx.training.checks import check_accelerator

from .conftest import (
    SCRIPT,
    SCRIPTS,
    WITHOUT_SEARCH,
    create_trainer,
    encoded_trainer,
    flags,
    launch_forked,
    make_options,
)
from .test_training_script import ADAPTER_WEIGHTS, weights_of


TRAIN = f"""
import runpy, traceback

try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except Exception:
    traceback.print_exc()  # as Python does; of forks, torchrun shows the error of the first to fail alone
    raise
"""
# Accelerate leaves FSDP out without a GPU, and says nothing; otherwise all is as it would be with one
WITH_FSDP = """
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

create = AcceleratorState.__init__


def create_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = create_with_fsdp
"""
FAILING = """
import os, signal
from diffusers_ctx.training.diffusion.stage import DiffusionStage

learn_from = DiffusionStage._learn_from


def fail(self, batch, random):
    if self.step == 1 and self.accelerator.process_index == 1:
        {what}
    try:
        return learn_from(self, batch, random)
    except RuntimeError:  # the other process is gone; of two forks that ended, torchrun names the first in order
        if self.accelerator.process_index == 0:
            signal.pause()
        raise


DiffusionStage._learn_from = fail
"""
SLOWLY_ENCODING = """
import os, time
from datetime import timedelta
from accelerate.utils import InitProcessGroupKwargs
from diffusers_ctx.training.encoding import latents
from diffusers_ctx.training.run import accelerator

accelerator.InitProcessGroupKwargs = lambda timeout: InitProcessGroupKwargs(timeout=timedelta(seconds=10))
encode = latents._encode


def encode_slowly(*arguments):
    assert os.environ["LOCAL_RANK"] == "0"
    time.sleep(12)
    return encode(*arguments)


latents._encode = encode_slowly
"""


def launch(
    folder: Path, program: str, options: dict, config: str = "ddp.yaml", processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Trains in several processes, in float32."""
    script = folder / "program.py"
    script.write_text(program)
    launcher = ["--config_file", SCRIPTS / "configs" / config, f"--num_processes={processes}"]
    launcher += ["--main_process_port=0", "--mixed_precision=no", "--num_cpu_threads_per_process=1"]
    return launch_forked(script, flags(options), launcher)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def tracked(output_dir: Path, name: str) -> list[float]:
    (events,) = (output_dir / "logs" / "context-adapter").glob("events.*")
    return [event.value for event in EventAccumulator(str(events)).Reload().Scalars(name)]


# weights in shards, held against one process with as large a batch


@pytest.fixture(scope="module")
def whole_and_sharded(base_model, photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("shards")
    shared = {
        "unfreeze_after": 0.5,  # after the first checkpoint: the LoRA has no moments yet
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "adam_epsilon": 1e-3,  # the usual one would divide rounding errors by themselves
        "max_grad_norm": 1e-3,
        "use_ema": True,
        "ema_decay": 0.6,
        "checkpointing_steps": 2,
        "report_to": "tensorboard",
    }
    create_trainer(make_options(base_model, photos, root / "whole", train_batch_size=4, **shared)).train()
    options = make_options(base_model, photos, root / "sharded", train_batch_size=2, **shared)
    launched = launch(root, WITH_FSDP + TRAIN, options, "fsdp2.yaml")
    assert (root / "sharded" / "README.md").exists(), launched.stderr
    return SimpleNamespace(options=options, whole=root / "whole", sharded=root / "sharded")


def test_with_shards_the_same_is_learned(whole_and_sharded):
    whole, sharded = whole_and_sharded.whole, whole_and_sharded.sharded
    assert (sharded / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()  # and not data parallelism once more
    assert_close(weights_of(sharded), weights_of(whole))
    norms = tracked(sharded, "gradient_norm")
    assert norms == pytest.approx(tracked(whole, "gradient_norm"), rel=1e-4) and min(norms) > 1e-3  # all were clipped


def test_a_run_with_shards_goes_on_from_its_checkpoint(whole_and_sharded, tmp_path):
    output_dir = tmp_path / "resumed"
    shutil.copytree(whole_and_sharded.sharded / "checkpoint-2", output_dir / "checkpoint-2")
    changes = {"output_dir": str(output_dir), "resume_from_checkpoint": "latest"}
    launched = launch(tmp_path, WITH_FSDP + TRAIN, whole_and_sharded.options | changes, "fsdp2.yaml")
    assert (output_dir / "README.md").exists(), launched.stderr
    assert len(tracked(output_dir, "loss")) == 2
    expected, got = weights_of(whole_and_sharded.sharded), weights_of(output_dir)
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


def test_without_shards_it_cannot_go_on_from_there(whole_and_sharded):
    changes = {"resume_from_checkpoint": str(whole_and_sharded.sharded / "checkpoint-2"), "train_batch_size": 4}
    with pytest.raises(ValueError, match=r"checkpoint-2 was made with FSDP or DeepSpeed; resume with the Accelerate"):
        encoded_trainer(whole_and_sharded.options | changes)


def test_a_whole_unet_of_shards_is_saved(base_model, photos, tmp_path):
    shared = {"mode": "full", "unfreeze_after": 0.0, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    shared |= WITHOUT_SEARCH | {"gradient_checkpointing": True}
    create_trainer(make_options(base_model, photos, tmp_path / "whole", train_batch_size=4, **shared)).train()
    options = make_options(base_model, photos, tmp_path / "sharded", train_batch_size=2, **shared)
    launched = launch(tmp_path, WITH_FSDP + TRAIN, options, "fsdp2.yaml")
    names = [*ADAPTER_WEIGHTS[:2], "unet/diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "sharded" / "README.md").exists(), launched.stderr
    assert_close(weights_of(tmp_path / "sharded", names), weights_of(tmp_path / "whole", names))


# one process of a launcher that could start more


@pytest.mark.parametrize("config_file", ["ddp.yaml", "fsdp2.yaml"])
def test_a_single_process_may_be_launched_as_one_of_several(base_model, photos, tmp_path, config_file):
    """The first two steps leave the LoRA as it is, and both kinds wait for its gradients nevertheless."""
    shared = {"unfreeze_after": 0.5, "max_train_steps": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    shared |= WITHOUT_SEARCH
    create_trainer(make_options(base_model, photos, tmp_path / "plain", **shared)).train()
    options = make_options(base_model, photos, tmp_path / "launched", **shared)
    program = WITH_FSDP + TRAIN if config_file == "fsdp2.yaml" else TRAIN
    launched = launch(tmp_path, program, options, config_file, processes=1)
    assert (tmp_path / "launched" / "README.md").exists(), launched.stderr
    assert_close(weights_of(tmp_path / "launched"), weights_of(tmp_path / "plain"))


# configurations that cannot work


@pytest.fixture
def config(options):
    return lambda **changes: parse_training_config(flags(options | changes))


def accelerator_with(
    kind: DistributedType, plugin: dict, precision: str = "no", processes: int = 2
) -> SimpleNamespace:
    plugins = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin), deepspeed_plugin=SimpleNamespace(**plugin))
    return SimpleNamespace(
        distributed_type=kind,
        state=plugins,
        mixed_precision=precision,
        num_processes=processes,
        device=torch.device("cuda"),
    )


@pytest.mark.parametrize(
    ("changes", "options_changed", "processes", "message"),
    [
        ({"fsdp_version": 1}, {}, 2, "With FSDP, set `fsdp_version` to 2"),
        ({"auto_wrap_policy": size_based_auto_wrap_policy}, {}, 2, "set `fsdp_auto_wrap_policy` to TRANSFORMER"),
        ({"activation_checkpointing": True}, {}, 2, "give `--gradient_checkpointing` instead of"),
        ({}, {"optimizer": "adamw_8bit"}, 2, "set `optimizer` to adamw"),
        ({}, {"train_text_encoder": True}, 2, "leave out `train_text_encoder`"),
        ({}, {"validation_prompt": "a street"}, 2, "leave out `validation_prompt`"),
        ({}, {"validation_images": 1}, 2, "leave out `validation_prompt` and `validation_images`"),
    ],
)
def test_fsdp_as_it_cannot_train(config, changes, options_changed, processes, message):
    plugin = {"fsdp_version": 2, "auto_wrap_policy": None, "activation_checkpointing": False}
    check_accelerator(accelerator_with(DistributedType.FSDP, plugin, "bf16"), config())
    accelerator = accelerator_with(DistributedType.FSDP, plugin | changes, processes=processes)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_accelerator(accelerator, config(**options_changed))


@pytest.mark.parametrize(
    ("changes", "options_changed", "precision", "message"),
    [
        ({"zero_stage": 3}, {}, "no", "With DEEPSPEED, set `zero_stage` to 1 or 2"),
        ({"deepspeed_config": {"gradient_accumulation_steps": 2}}, {}, "no", "`gradient_accumulation_steps` to 1"),
        ({"offload_optimizer_device": "cpu"}, {}, "no", "set `offload_optimizer_device` to none"),
        ({}, {}, "bf16", "set `mixed_precision` to no, or use FSDP2"),
        ({}, {"unfreeze_after": 0.2}, "no", "set `unfreeze_after` to 0, or use FSDP2"),
        ({}, {"optimizer": "prodigy"}, "no", "set `optimizer` to adamw"),
        ({}, {"train_text_encoder": True}, "no", "leave out `train_text_encoder`"),
        ({}, {"streaming": True}, "no", "leave out `streaming`"),
    ],
)
def test_deepspeed_as_it_cannot_train(config, changes, options_changed, precision, message):
    automatic = {"gradient_accumulation_steps": "auto"}
    plugin = {"zero_stage": 2, "offload_optimizer_device": "none", "deepspeed_config": automatic}
    for works in ({"unfreeze_after": 0}, {"mode": "frozen"}):
        check_accelerator(accelerator_with(DistributedType.DEEPSPEED, plugin), config(**works))
    accelerator = accelerator_with(DistributedType.DEEPSPEED, plugin | changes, precision)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_accelerator(accelerator, config(**{"unfreeze_after": 0} | options_changed))


# data that does not go round, and a process that fails


def test_a_last_batch_for_one_process_alone_is_left_out(base_model, photos, tmp_path):
    # 21 rows an epoch: five batches of four, of which each process takes two
    shared = {"max_train_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "unfreeze_after": 0.0}
    # images that learn combinations are the same, wherever they are
    shared |= WITHOUT_SEARCH | {"composition_weight": 1.0}
    create_trainer(make_options(base_model, photos, tmp_path / "one", train_batch_size=8, **shared)).train()
    launch(tmp_path, TRAIN, make_options(base_model, photos, tmp_path / "two", train_batch_size=4, **shared))
    assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"))


def test_one_process_may_encode_for_longer_than_others_may_wait_for_an_answer(options, tmp_path):
    changes = {"cache_latents": True, "cache_dir": str(tmp_path / "cache"), "train_batch_size": 2}
    launched = launch(tmp_path, SLOWLY_ENCODING + TRAIN, options | changes)
    assert (tmp_path / "adapter" / "README.md").exists(), launched.stderr
    kept = (tmp_path / "cache" / "context-latents").iterdir()
    assert sorted(path.name.partition("-")[0] for path in kept) == ["captions", "latents"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("raise RuntimeError('this process is out of memory')", "RuntimeError: this process is out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
        (
            "self.objective.register_forward_hook(lambda *_: _[-1] * float('nan'))",
            "FloatingPointError: The loss is nan",
        ),
    ],
)
def test_a_process_that_fails_ends_the_run(options, tmp_path, what, error):
    changes = WITHOUT_SEARCH | {"train_batch_size": 2, "max_train_steps": 500, "checkpointing_steps": 1}
    launched = launch(tmp_path, FAILING.format(what=what) + TRAIN, options | changes)
    assert launched.returncode != 0 and error in launched.stderr
    assert {path.name for path in (tmp_path / "adapter").glob("[!.]*")} == {"checkpoint-0", "checkpoint-1"}


def test_an_image_that_cannot_be_read_ends_the_run(options, photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "snow" / "3.png").write_bytes(b"no image")
    launched = launch(tmp_path, TRAIN, options | {"train_data_dir": str(root), "train_batch_size": 2})
    assert launched.returncode != 0 and "ValueError: 1 of 18 images cannot be read" in launched.stderr
