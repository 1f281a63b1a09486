"""From one method and one problem to a record: the training, the fits after it, and the reading of its predictions."""
