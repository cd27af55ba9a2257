"""Plot the curves and the pictures of a run."""
