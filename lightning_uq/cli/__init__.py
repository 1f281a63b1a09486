"""The command line ``lightning-uq``: one file per command, whose options are the arguments of a function."""

from lightning_uq.cli.entry import main

__all__ = ["main"]
