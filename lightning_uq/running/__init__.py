"""Running a model correctly inside a hook: its mode, its loaders, its ranks, its random numbers and its weights.

Modules and callbacks stand on this room, which knows neither.
"""
