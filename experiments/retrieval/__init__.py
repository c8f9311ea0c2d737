"""How much the sources of a retrieval corpus are worth; see __main__ for how to run it."""
