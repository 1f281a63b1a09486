"""The page of a user's own module, written at the end of a test under the user's Trainer."""
