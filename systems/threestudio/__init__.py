"""`backend=threestudio`: threestudio's own configs, systems and folders, in parallel.

Everything but the training loop is threestudio's: it reads the config, builds the
system, renders and writes. It is imported from an unmodified checkout.
"""
