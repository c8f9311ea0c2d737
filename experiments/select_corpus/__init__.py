"""Documents of a large corpus that resemble a small one; see __main__ for how to run it."""
