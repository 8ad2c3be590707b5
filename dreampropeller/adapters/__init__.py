"""Other people's samplers and training loops as trajectories.

Nothing here is imported by `dreampropeller` itself: name the module you want.
"""
