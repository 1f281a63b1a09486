"""The version of this package, which is stored in files of fitted states."""

__version__ = "0.1.0"
