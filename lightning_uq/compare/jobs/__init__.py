"""Trainings shared out over processes."""
