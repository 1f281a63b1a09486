"""The user's own LightningModules as members of an ensemble: each runs unmodified and takes the steps that it would take alone."""
