"""`diffusers-ctx check`: looks at images before hours are spent on them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .parameters import LocalPath


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .checks import DataReport

_SHEET_COLUMNS = 8
_TILE = 128  # pixels
_WIDTH = 100  # letters of a line


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx check photos
  diffusers-ctx check photos --resolution 512 --contact_sheet sheet.png
  diffusers-ctx check photos --json > report.json

Exit code 1 says that there are problems; remarks may be as they should be."""
)
@click.argument("data", metavar="DATA")
@click.option("--obs_context", default="obs", show_default=True, help="Name of the observational context.")
@click.option("--caption_column", default="text", show_default=True, help="The column of captions in metadata files.")
@click.option("--resolution", type=click.IntRange(min=1), help="Of the training: says which images are smaller.")
@click.option("--contact_sheet", type=LocalPath(), metavar="FILE", help="Draw some images of each context.")
@click.option("--seed", default=0, show_default=True, help="Seed of the tests, and of the images in the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    ctx: click.Context,
    data: str,
    obs_context: str,
    caption_column: str,
    resolution: int | None,
    contact_sheet: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Check a folder of contexts before training on it.

    DATA has one folder of images per context, as for training. Counts images and captions; finds copies, imbalance,
    captions that give the context away, contexts that cannot be told from the observational one, and pairs by file
    name; and says what to expect of this many images.
    """
    if contact_sheet is not None:
        from ..plot.libraries import require

        require("matplotlib")  # before everything is read
    from .checks import check_data

    try:
        report = check_data(
            data, obs_context=obs_context, text_column=caption_column, resolution=resolution, seed=seed
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise click.BadParameter(str(error), param_hint="'DATA'") from error
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else _in_words(data, report))
    if contact_sheet is not None:
        contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        _draw_contact_sheet(report, seed).savefig(contact_sheet, dpi=_TILE)
        click.echo(f"Contact sheet: {contact_sheet}", err=True)
    ctx.exit(1 if report.problems else 0)


def _in_words(data: str, report: DataReport) -> str:
    table = report.table
    lines = [f"{data}: {len(table.names)} contexts, {len(table.contexts)} images", "", *_counts(report)]
    remarks = [finding for finding in report.findings if finding not in report.problems]
    for title, findings in (("Problems", report.problems), ("Remarks", remarks)):
        lines += ["", title, *(_item(f"{finding.check}: {finding.message}") for finding in findings)]
        lines += [] if findings else [_item("none")]
    return "\n".join([*lines, "", "What to expect", *map(_item, report.expected)])


def _counts(report: DataReport) -> list[str]:
    """A table of the contexts."""
    from .checks import percent

    rows = [("context", "images", "captions", "shorter side (min, median, max)", "told from the observational")]
    for context, found in report.contexts.items():
        test = report.tests.get(context)
        told = "" if test is None else f"{percent(test.accuracy)} (chance 50 %)"
        sides = ", ".join(map(str, found["shorter_side"]))
        rows.append((context, str(found["images"]), str(found["captions"]), sides, told))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _item(text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _draw_contact_sheet(report: DataReport, seed: int) -> Figure:
    import numpy as np
    import PIL.ImageOps

    from ..plot import image_grid

    rng = np.random.default_rng(seed)
    rows = []
    for context in report.table.names:
        chosen = sorted(rng.permutation(report.table.rows(context))[:_SHEET_COLUMNS].tolist())
        pictures = [report.dataset[row]["image"] for row in chosen]
        rows.append([PIL.ImageOps.pad(picture, (_TILE, _TILE), color="white") for picture in pictures])
    names = [f"{context}\n{len(report.table.rows(context))} images" for context in report.table.names]
    return image_grid(rows, names, size=1)
