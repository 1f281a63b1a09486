"""The version of this package, which the files of fitted states name."""

__version__ = "0.1.0"
