"""Experiment configs: one file each, loaded with `--config=configs/<file>.py[:<arg>]`."""
