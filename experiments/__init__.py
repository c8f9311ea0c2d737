"""Programs, run as `python -m experiments.X`. All that touches disk, network or flags is here."""
