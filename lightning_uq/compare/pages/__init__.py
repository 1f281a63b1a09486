"""The pages and figures of runs."""
