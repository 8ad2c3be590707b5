"""From YAML and command line to validated settings."""
