"""Where in an image a UNet attends to the tokens of each concept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from .backbones import UNetBackbone, backbone_of


@contextmanager
def collect_attention(unet: UNet2DConditionModel) -> Iterator[AttentionMaps]:
    """While it is open, gathers the attention that `unet` pays to context tokens; images come out as without it.

    Hooks listen to the projections of queries and keys and are removed in the end. They compute the softmax a second
    time, since fused kernels do not give theirs away.

    Raises:
        ValueError: if the model is no UNet, no context adapter is loaded, or images of another number or size are made
            before it is closed.
        RuntimeError: if the adapter's attention processors have been replaced since it was loaded.
    """
    backbone = backbone_of(unet)
    if not isinstance(backbone, UNetBackbone):
        raise ValueError(f"Attention is collected in UNets alone, and this is a {backbone.name}.")
    module = backbone.context_module
    if module is None:
        raise ValueError("The UNet has no context adapter; call `load_context_adapter(...)` first.")
    maps = AttentionMaps(backbone, module.tokens_shape[:2])
    with ExitStack() as stack:
        for hook in maps.listen_to(unet):
            stack.callback(hook.remove)
        yield maps


class AttentionMaps:
    """How much of each place's attention falls on the tokens of each node: the mean over heads and denoising steps.

    With the injection `cross_attention`, context tokens have a softmax of their own, and the shares of all nodes add
    up to 1: only differences between places tell something. With `prompt`, the text takes the rest. Under guidance,
    the maps are those of the prompt's half. Calls without context tokens, and those at scale 0, do not count.

    Args:
        backbone: the UNet, with a context adapter.
        tokens_shape: (N, T), nodes and tokens of each.

    Attributes:
        num_calls: calls of the UNet that were listened to.
    """

    def __init__(self, backbone: UNetBackbone, tokens_shape: tuple[int, int]):
        self.num_calls = 0
        self._backbone, self._tokens_shape = backbone, tokens_shape
        self._sums: dict[str, torch.Tensor] = {}
        self._queries: dict[str, torch.Tensor] = {}
        self._latent_shape: tuple[int, int, int] | None = None  # images, height and width
        self._is_listening = False

    @property
    def layers(self) -> dict[str, torch.Tensor]:
        """Maps (B, N, h, w) by the name of the layer, each as large as its layer's features.

        Raises:
            ValueError: if no images were made, or the adapter's scale was 0.
        """
        if not self._sums:
            raise ValueError(
                "No attention to context tokens was seen; make images while the maps are collected, at a scale above"
                " 0."
            )
        return {name: total / self.num_calls for name, total in self._sums.items()}

    def mean(self, layers: str = "") -> torch.Tensor:
        """The mean (B, N, H, W) over layers, all enlarged to the size of the largest.

        Args:
            layers: beginning of the names of layers to take, such as `up_blocks`; by default all.

        Raises:
            ValueError: if no such layer was listened to, or as in `layers`.
        """
        chosen = [maps for name, maps in self.layers.items() if name.startswith(layers)]
        if not chosen:
            raise ValueError(f"No layer's name begins with {layers!r}; there are {list(self._sums)}.")
        size = max((maps.shape[2:] for maps in chosen), key=math.prod)
        return torch.stack([F.interpolate(maps, size, mode="nearest-exact") for maps in chosen]).mean(dim=0)

    def listen_to(self, unet: UNet2DConditionModel) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks on `unet`."""
        # before the adapter's hook, which repeats tokens for guidance; and before that of context guidance, which
        # calls the UNet again
        yield unet.register_forward_pre_hook(self._begin_call, with_kwargs=True, prepend=True)
        yield unet.register_forward_hook(self._end_call, prepend=True)
        behind_text = self._backbone.injection == "prompt"
        for name, layer in unet.named_modules():
            if name.endswith(".attn2"):
                keys = layer.to_k if behind_text else layer.processor.to_k_ip[0]
                yield layer.to_q.register_forward_hook(partial(self._keep_query, name))
                yield keys.register_forward_hook(partial(self._add_attention, name, layer.heads))

    def _begin_call(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = self._backbone.tokens_of_call(args, kwargs)
        # none for the features of a posterior, nor for a plain pipeline, which the adapter's hook refuses
        self._is_listening = tokens is not None and max(self._backbone.token_scales) > 0
        if tokens is None or not self._is_listening:
            return
        sample = args[0] if args else kwargs["sample"]
        shape = (len(tokens), *sample.shape[2:])
        if self._latent_shape not in (None, shape):
            raise ValueError(
                f"Attention was collected for images and latents of the shape {self._latent_shape}, and now they are"
                f" {shape}; collect that of each call on its own."
            )
        self._latent_shape = shape

    def _end_call(self, unet: nn.Module, args: tuple, output: Any) -> None:
        self.num_calls += self._is_listening
        self._is_listening = False

    def _keep_query(self, name: str, projection: nn.Module, args: tuple, query: torch.Tensor) -> None:
        if self._is_listening:
            self._queries[name] = query

    @torch.no_grad()
    def _add_attention(self, name: str, heads: int, projection: nn.Module, args: tuple, keys: torch.Tensor) -> None:
        if not self._is_listening:
            return
        num_images, height, width = self._latent_shape  # type: ignore[misc]
        nodes, tokens = self._tokens_shape
        # tokens come as (B, N, T, D), or behind those of the text
        query, key = (
            x[-num_images:].flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2).float()
            for x in (self._queries.pop(name), keys)
        )
        shares = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        shares = shares[..., -nodes * tokens :].unflatten(-1, (nodes, tokens)).sum(dim=-1).mean(dim=1)
        maps = shares.transpose(1, 2).unflatten(2, _feature_size(shares.shape[1], height, width))
        self._sums[name] = self._sums[name] + maps if name in self._sums else maps


def _feature_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a number of features, which come from latents of this size by halving it."""
    while height * width > count:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height, width
