"""Training in stages, each on what the model of that moment would learn most from; see __main__."""
