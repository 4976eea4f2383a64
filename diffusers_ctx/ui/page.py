"""The page: a choice of adapters, and below it what belongs to the one that is chosen."""

from __future__ import annotations

import gradio as gr
import torch

from ..embedded import embedded_adapters
from ..plot.libraries import require
from .events import PRIVATE, QUEUED, in_words
from .session import Session
from .studio import Studio
from .studios import Studios
from .workplace import lay_out


_FORGET = 3600  # seconds after which pictures that were shown are deleted
_STYLE = """
.small-pixels img { image-rendering: pixelated; }
.enlarged .image-frame, .enlarged img { width: 100%; height: auto; object-fit: contain; }
.status { min-height: 3rem; }
"""
_SMALLER = "Choose an adapter of a smaller base model."
_TITLE = """# Concepts that compose
Move a slider to intervene on a concept. The twin has the same noise, and no intervention."""


def build_page(
    adapter: str = "quad", base: str | None = None, dtype: torch.dtype = torch.float32, hub_only: bool = False
) -> gr.Blocks:
    """The page, open on an adapter; show it with [`launch`].

    Nothing is downloaded for an adapter that comes with the library.

    Args:
        adapter: name of one that comes with the library, folder, or Hub id. Visitors may choose another one.
        base: folder or Hub id of the base model; by default the one that the adapter names.
        dtype: precision of all models.
        hub_only: whether visitors may name repositories on the Hub, and no folders: for pages that strangers see. The
            adapter and the base that are given here may be folders all the same.

    Raises:
        AdapterError: if there is no such adapter, or it does not fit the base model.
        ValueError: if no base model is given and the adapter does not say enough to load one.
    """
    studios = Studios(dtype, hub_only, own=(adapter, base))
    _prepare(studios.open(adapter, base))
    with gr.Blocks(title="diffusers_ctx", analytics_enabled=False, delete_cache=(_FORGET, _FORGET)) as page:
        gr.Markdown(_TITLE)
        chosen = _choice(studios, adapter, base, hub_only)

        @gr.render(inputs=chosen, concurrency_id=QUEUED["concurrency_id"], concurrency_limit=1)
        def show(choice: tuple[str, str | None]) -> None:
            with in_words(_SMALLER):
                lay_out(Session(studios.open(*choice)))

    return page


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Shows a page until the process is stopped.

    Args:
        page: what [`build_page`] made.
        host: address to listen at; by default this machine alone, or what `GRADIO_SERVER_NAME` says.
        port: port to listen at; by default the first free one from 7860 on.

    Raises:
        OSError: if the port is taken.
    """
    page.launch(
        server_name=host,
        server_port=port,
        css=_STYLE,
        theme=gr.themes.Default(),
        footer_links=[],
        ssr_mode=False,
        quiet=True,  # gradio advises flags that this function does not have
        prevent_thread_lock=True,
    )
    print(f"Open {page.local_url}", flush=True)
    page.block_thread()


def _prepare(studio: Studio) -> None:
    """Draws what the page opens with, which the studio remembers: whoever comes first need not wait.

    Raises:
        ImportError: if matplotlib or networkx is not installed.
    """
    Session(studio).draw_first()
    studio.graph(tuple(studio.defaults().interventions))
    require("matplotlib.pyplot")  # gradio imports it in the first event, which takes a second


def _choice(studios: Studios, adapter: str, base: str | None, hub_only: bool) -> gr.State:
    """Lets a visitor choose an adapter; holds its name and that of its base model."""
    chosen = gr.State((adapter, base))
    place = "a repository on the Hub" if hub_only else "a folder, or a repository on the Hub"
    with gr.Accordion("Choose another adapter", open=False), gr.Row(equal_height=True):
        name = gr.Dropdown(
            list(dict.fromkeys([adapter, *embedded_adapters()])),
            value=adapter,
            allow_custom_value=True,
            interactive=True,
            label="Adapter",
            info=f"One of the list, {place}.",
        )
        base_name = gr.Textbox(
            base or "", label="Base model", info="Only if the adapter does not name it.", interactive=True
        )
        load = gr.Button("Load", min_width=90, scale=0)

    def choose(name: str | None, base_name: str) -> tuple[str, str | None]:
        choice = (name or "").strip(), base_name.strip() or None
        with in_words(_SMALLER):
            studios.open(*choice)
        return choice

    load.click(choose, [name, base_name], chosen, show_progress_on=name, **PRIVATE)
    return chosen
