"""Where the drifts of a window are evaluated."""
