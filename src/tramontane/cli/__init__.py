"""The shell: one file a command. Owns words on a terminal; must not know the engine, models or arrays."""

from tramontane.cli.app import main

__all__ = ["main"]
