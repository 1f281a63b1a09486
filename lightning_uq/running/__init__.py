"""Running a model correctly inside a hook: its mode, loaders, ranks, random numbers and weights.

Modules and callbacks build on this package, which knows neither.
"""
