"""The suite; a package, so that no package `tests` that some project installs is taken for it."""
