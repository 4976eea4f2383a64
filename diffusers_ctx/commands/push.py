"""`diffusers-ctx push`: an adapter goes to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from .parameters import ExistingPath


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx push weather-context weather-context --private
  diffusers-ctx push weather-context someone/weather-context --create_pr"""
)
@click.argument("folder", type=ExistingPath(), metavar="FOLDER")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, default=None, help="Make a new repository private.")
@click.option("--commit_message", default="Upload context adapter", show_default=True)
@click.option("--create_pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--hub_token", help="Token with write access; by default that of `hf auth login`.")
def push(
    folder: Path, repo_id: str, private: bool | None, commit_message: str, create_pr: bool, hub_token: str | None
) -> None:
    """Push an adapter to the Hub, with its card.

    Checkpoints, logs and other files in the folder stay where they are.
    """
    from ..hub import push_adapter_folder

    commit = push_adapter_folder(
        folder, repo_id, token=hub_token, private=private, commit_message=commit_message, create_pr=create_pr
    )
    click.echo(commit.pr_url or commit.commit_url)
