"""One run at a time in a folder."""

import errno
import fcntl
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ForkedProgram, run_script

from diffusers_ctx.training.run.files import run_lock

from .conftest import create_trainer, encoded_trainer, files_in
from .test_processes import TRAIN, launch
from .test_stop_signals import wait_for


HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from diffusers_ctx.training.run.files import run_lock

    folder, held = map(Path, sys.argv[1:])
    with run_lock(folder):
        held.touch()
        time.sleep(600)
""")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


@pytest.fixture
def other_run(folder, tmp_path) -> Iterator[ForkedProgram]:
    """A process that holds the folder."""
    script, held = tmp_path / "hold.py", tmp_path / "held"
    script.write_text(HOLD)
    process = ForkedProgram(run_script, script, [folder, held])
    wait_for(held.exists, process)
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("other_run")
def test_another_run_in_the_folder_is_an_error(folder):
    message = "Another run is training in .*adapter; wait for it, .* `output_dir`"
    for _ in range(2):  # the one that was refused has not freed the lock
        with pytest.raises(OSError, match=message), run_lock(folder):
            pytest.fail("two runs were let in")


def test_what_a_killed_run_held_is_free(folder, other_run):
    other_run.kill()
    other_run.wait()
    assert files_in(folder)  # it could not clean up
    with run_lock(folder):
        assert files_in(folder)
    assert files_in(folder) == {}


def test_trainers_of_one_process_share_the_folder(options, folder):
    waiting = create_trainer(options)
    waiting.load()
    with waiting.open():
        create_trainer(options).train()
        assert (folder / ".training.lock").exists()  # one still holds it
    assert not (folder / ".training.lock").exists()


def test_a_file_system_that_cannot_lock_is_warned_of(folder, monkeypatch, caplog):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock(folder):
        pass
    assert re.search("adapter cannot be locked .*make sure that no other run trains", caplog.text)
    assert files_in(folder) == {}


@pytest.mark.usefixtures("other_run")
def test_a_second_run_leaves_alone_what_the_first_is_writing(options, folder):
    (folder / "unfinished-checkpoint-2").mkdir()
    with pytest.raises(OSError, match="Another run is training"):
        encoded_trainer(options)
    assert (folder / "unfinished-checkpoint-2").exists()


@pytest.mark.usefixtures("other_run")
def test_processes_of_a_second_run_do_not_wait_for_one_another(options, folder, tmp_path):
    launched = launch(tmp_path, TRAIN, options | {"train_batch_size": 2})
    assert launched.returncode != 0 and "Another run is training in" in launched.stderr
    assert set(files_in(folder)) == {".training.lock"}
