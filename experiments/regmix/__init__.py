"""Mixtures from a swarm of small runs: fit their losses, and propose the mixture of the lowest."""
