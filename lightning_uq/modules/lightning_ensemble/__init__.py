"""The user's own LightningModules as members of an ensemble: each runs unmodified, and trains as it would alone."""
