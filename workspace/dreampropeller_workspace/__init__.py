"""The workspace of DreamPropeller as a package: systems, configs and a command."""
