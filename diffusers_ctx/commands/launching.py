"""Starts a module of the library with `accelerate launch`, once its flags are known to be right."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import click


PASSED_ON = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"""Settings of a command whose flags are another program's."""

launcher_flags_option = click.option(
    "--launcher_flags",
    default="",
    metavar="FLAGS",
    help="Flags of `accelerate launch`, in quotes, such as '--num_processes 2'.",
)


def list_flags_option(parse: Callable[[list[str]], Any]) -> Callable:
    """An option that prints all flags that `parse` takes."""

    def print_flags(ctx: click.Context, parameter: click.Parameter, is_given: bool) -> None:
        if is_given:
            parse(["--help"])  # argparse prints and exits

    options: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
    return click.option("--list_flags", callback=print_flags, help="Print all flags.", **options)


def check_flags(
    ctx: click.Context, parse: Callable[[list[str]], Any], arguments: Sequence[str], groups: Iterable[type]
) -> None:
    """Checks a command line before anything is started.

    Args:
        ctx: of the command.
        parse: reads the command line into options.
        arguments: the command line.
        groups: the dataclasses of the options.

    Raises:
        UsageError: if a flag is no option, or not written in full, or a value is wrong.
    """
    _refuse_unknown_flags(ctx, arguments, groups)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):  # argparse prints all flags before what is wrong
            parse(list(arguments))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error), ctx) from error
    except SystemExit as error:
        _, _, message = complaint.getvalue().strip().rpartition("error: ")
        raise click.UsageError(f"{message.rstrip('.')}.", ctx) from error


def launch(module: str, arguments: Sequence[str], launcher_flags: str) -> None:
    """Runs `accelerate launch -m module arguments`; exits with 1 if that fails."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    # quiet: what went wrong is shown by the process itself, and not by its launcher once more
    launch_command(
        launch_command_parser().parse_args(["--quiet", *shlex.split(launcher_flags), "-m", module, *arguments])
    )


def _refuse_unknown_flags(ctx: click.Context, arguments: Sequence[str], groups: Iterable[type]) -> None:
    options = [field for group in groups for field in fields(group)]  # type: ignore[arg-type]
    known = {option.name for option in options} | {f"no_{option.name}" for option in options if option.default is True}
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in known:
            near = [f"--{option}" for option in get_close_matches(name, known, n=2)]
            raise click.NoSuchOption(flag, possibilities=near, ctx=ctx)
