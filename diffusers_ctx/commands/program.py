"""`diffusers-ctx`, the program that has all commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ..version import __version__
from .check import check
from .counterfactual import counterfactual
from .demo import demo
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .push import push
from .sample import sample
from .train import train
from .ui import ui


NAME = "diffusers-ctx"
PROBLEMS, WRONG_USE, STOPPED = 1, 2, 130

_SECTIONS = {
    "Begin": (demo, check),
    "Learn": (train, evaluate),
    "Use": (sample, counterfactual, ui, inspect, export, push),
}


class Program(click.Group):
    """Lists its commands in sections, in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(command.name) for commands in _SECTIONS.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(command.name), command.get_short_help_str(80)) for command in commands])


@click.group(
    cls=Program,
    commands=[command for commands in _SECTIONS.values() for command in commands],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all is well, 1 problems were found or the work failed, 2 wrong use.",
)
@click.version_option(__version__, prog_name=NAME)
def program() -> None:
    """Adapters that learn concepts from folders of images, one per concept, and compose them.

    \b
    diffusers-ctx demo
    diffusers-ctx check photos
    diffusers-ctx train --pretrained_model_name_or_path BASE --train_data_dir photos
    diffusers-ctx sample context-adapter --prompt "a street" --interventions night+snow
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of this process, and returns its exit code.

    Whatever is wrong with flags, files or data ends in a sentence on the standard error; other errors are bugs, and
    show where they came from.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = program.main(given or ["--help"], prog_name=NAME, standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else NAME
        return _fail(f"{error.format_message()} See `{command} --help`.", WRONG_USE)
    except click.ClickException as error:
        return _fail(error.format_message(), PROBLEMS)
    except (click.Abort, KeyboardInterrupt):
        return _fail("Stopped.", STOPPED)
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error), PROBLEMS)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    click.echo(f"{NAME}: {message}", err=True)
    return status
