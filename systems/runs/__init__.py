"""A run on disk and on screen: folder, recorder, workers, results, report."""
