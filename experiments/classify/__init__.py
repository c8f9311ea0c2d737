"""Weightings on small classification tasks, each against the plain mean; see `__main__`."""
