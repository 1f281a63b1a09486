"""Distributes trainings over processes."""
