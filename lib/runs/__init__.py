"""How work is run and kept: settings, files, checkpoints, notebooks."""
