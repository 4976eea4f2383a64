"""The command `diffusers-ctx`: a module for each of its commands, none of which imports much before it runs."""

from .program import main


__all__ = ["main"]
