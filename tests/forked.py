"""Programs in processes of their own that start at once: forks of a server that has imported the library.

Importing it takes each process ten seconds. Not for programs whose environment is read by imports, as `HF_HOME` is.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["diffusers_ctx.training", "accelerate.commands.launch", "torch.distributed.run"])


class ForkedProgram:
    """A call in a fork of the server, with the methods of `subprocess.Popen` that tests use; its output is text.

    Args:
        call: what it runs, a function of a module.
        arguments: of the call.
        environment: of the process; by default that of this one.
    """

    def __init__(self, call: Callable, *arguments: object, environment: dict[str, str] | None = None):
        self._output = tempfile.TemporaryDirectory()
        everything = (call, arguments, environment or dict(os.environ), self._output.name)
        self._process = _SERVER.Process(target=_run, args=everything)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"The program did not end within {timeout} s.\n{self._read('stderr')}")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What the program has written to stdout and stderr by its end.

        Raises:
            TimeoutError: if it takes longer; it is killed.
        """
        self.wait(timeout)
        return self._read("stdout"), self._read("stderr")

    def _read(self, name: str) -> str:
        return (Path(self._output.name) / name).read_text()


def run_script(script: Path, arguments: Sequence[object]) -> None:
    """Runs a script as `python script` does."""
    sys.argv = [str(script), *map(str, arguments)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def accelerate_launch(arguments: Sequence[object]) -> None:
    """`accelerate launch` of several processes, which are forks as well."""
    options = launch_command_parser().parse_args([str(argument) for argument in arguments])
    options.run_path, options.start_method = True, "fork"  # options of `torchrun`, which starts them
    launch_command(options)


def complete(program: ForkedProgram, timeout: float) -> subprocess.CompletedProcess[str]:
    output, errors = program.communicate(timeout)
    return subprocess.CompletedProcess([], program.returncode, output, errors)


def _run(call: Callable, arguments: Sequence[object], environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (Path(output) / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    call(*arguments)
