"""Training on a part of the data, chosen by scores, at equal numbers of steps; see `__main__`."""
