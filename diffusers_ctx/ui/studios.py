"""The studios that are open."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock

import torch

from ..embedded import embedded_adapters, embedded_call
from .recent import Recent
from .studio import Studio, base_of


_OPEN = 2
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Studios:
    """Opens a studio for an adapter, once: visitors who choose the same one share it.

    The two that were chosen last stay open.

    Args:
        dtype: precision of all models.
        hub_only: whether to refuse folders, as a page has to whose visitors have no business with the machine's files.
        own: adapter and base that are opened all the same, since the host chose them.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, hub_only: bool = False, own: tuple[str, str | None] | None = None
    ) -> None:
        self._dtype = dtype
        self._hub_only = hub_only
        self._own = own
        self._lock = Lock()
        self._open: Recent[Studio] = Recent(_OPEN)

    def open(self, adapter: str, base: str | None = None) -> Studio:
        """The studio of an adapter.

        Args:
            adapter: name of one that comes with the library, folder, or Hub id.
            base: folder or Hub id of the base model; by default the one that the adapter names.

        Raises:
            ValueError: as [`Studio`]; if no adapter is named; for folders where these are refused.
        """
        if not adapter:
            raise ValueError("Name an adapter: one of the list, a folder, or a repository on the Hub.")
        chosen = adapter, base
        with self._lock:
            if chosen not in self._open:  # what is open was checked, and the Hub need not be asked again
                base = self._checked_base(adapter, base)  # before a studio is closed for it
            return self._open.get(chosen, lambda: Studio(adapter, base, self._dtype))

    def _checked_base(self, adapter: str, base: str | None) -> str:
        is_strange = self._hub_only and (adapter, base) != self._own
        if is_strange:
            _refuse_folder(adapter)
        base = base or base_of(adapter)
        if is_strange and embedded_call(base) is None:  # a stranger may have written the adapter's config
            _refuse_folder(base)
        return base


def _refuse_folder(name: str) -> None:
    is_known = name in embedded_adapters() or (_HUB_ID.fullmatch(name) and ".." not in name)
    if not is_known or Path(name).exists():
        raise ValueError(f"'{name}' is no name on the Hub, such as owner/name, and this page opens no folders.")
