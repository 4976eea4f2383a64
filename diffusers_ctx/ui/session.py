"""A visitor's work."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import NamedTuple

from PIL.Image import Image

from .settings import Settings, save_with_settings
from .studio import OnStep, Studio


_LONGEST_NAME = 100  # bytes of a file's name that say its interventions; file systems allow 255 in all


class Stopped(Exception):
    """The visitor has stopped the work."""


class Shown(NamedTuple):
    """PNG files of an image and of its observational twin, which differ in their interventions alone."""

    image: Path
    twin: Path


class Session:
    """One visitor's work with a studio. Nothing of it is known to other visitors.

    Args:
        studio: where the visitor is.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._stopped = Event()
        self._folder = TemporaryDirectory(prefix="diffusers-ctx-")  # gone when the session is

    def stop(self) -> None:
        """Ends what is being drawn, after its present step."""
        self._stopped.set()

    def watch(self, progress: OnStep) -> OnStep:
        """Begins some work: what the studio is to tell of its steps.

        It passes them on to `progress`, and raises [`Stopped`] once the visitor stops.
        """
        stopped = self._stopped = Event()  # its own: what was stopped may take a last step when the next begins

        def on_step(done: int, total: int) -> None:
            if stopped.is_set():
                raise Stopped
            progress(done, total)

        return on_step

    def draw_first(self) -> Shown:
        """What the page opens with."""
        return self.draw(self.studio.defaults(), lambda done, total: None)

    def draw(self, settings: Settings, progress: OnStep) -> Shown:
        """Draws an image and its twin.

        Raises:
            Stopped: if the visitor stops it.
        """
        on_step = self.watch(progress)
        observational = settings.under({})
        image, twin = (self.studio.draw(each, on_step) for each in (settings, observational))
        return Shown(self._save(image, settings), self._save(twin, observational))

    def _save(self, image: Image, settings: Settings) -> Path:
        context = re.sub(r"[^\w+.-]", "_", "+".join(settings.interventions)) or "observational"
        file = Path(self._folder.name, f"{_shortened(context)}-{settings.seed}.png")
        save_with_settings(image, file, settings, self.studio.models)
        return file


def _shortened(name: str) -> str:
    return name.encode()[:_LONGEST_NAME].decode(errors="ignore")
