"""What single examples are worth, and whether the answers hold; see __main__ for how to run it."""
