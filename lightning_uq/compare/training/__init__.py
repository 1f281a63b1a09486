"""From a method and a problem to a record: the training, the fits after it, and the evaluation of its predictions."""
