"""Faults, really done to real processes: what is lost, how soon it is noticed."""
