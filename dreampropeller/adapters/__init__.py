"""Other people's training loops and samplers as trajectories."""
