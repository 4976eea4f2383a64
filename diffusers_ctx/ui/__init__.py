"""The page of `diffusers-ctx ui`: an adapter to play with in a browser. It needs the extra `ui`."""

try:
    import gradio as gradio
except ImportError as error:
    raise ImportError("The page needs gradio; run `pip install 'diffusers-ctx[ui]'`.") from error

from .page import build_page, launch


__all__ = ["build_page", "launch"]
