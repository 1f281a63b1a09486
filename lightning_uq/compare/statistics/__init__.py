"""The numbers of the table, their intervals, ties and the verdict, computed only from records."""
