"""Programs: everything that touches disk, network or flags lives here. Run as `python -m experiments.X`."""
