"""A run's directory: what it holds, how it is written and read again, and when a later run may go on in it."""
