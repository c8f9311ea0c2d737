"""Our functions beside the same ones of other packages, in one run; see `__main__`."""
