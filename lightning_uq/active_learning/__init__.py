"""Which unlabelled samples to label next."""
