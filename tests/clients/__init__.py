"""Projects that nobody here wrote: their own classes, with a tiny data set each."""
