"""Accelerations: past iterations are used to need fewer of them."""
