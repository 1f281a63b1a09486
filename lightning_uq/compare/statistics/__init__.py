"""The numbers of the table, their intervals, ties and the verdict, from records alone."""
