"""The progress reports of a run."""
