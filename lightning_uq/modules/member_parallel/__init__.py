"""The members of an ensemble over the processes of a training."""
