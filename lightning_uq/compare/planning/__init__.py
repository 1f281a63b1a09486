"""Plans a comparison: the methods, their trainings and settings, and a trial of each before the first training."""
