"""The page of one's own module, at the end of a test under one's own Trainer."""
