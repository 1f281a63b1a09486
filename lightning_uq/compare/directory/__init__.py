"""A run's directory: its files, how they are written and read, and when a later run may continue in it."""
