"""Samplers and training loops of other libraries as trajectories.

`dreampropeller` itself imports none of these modules: import the one you need.
"""
