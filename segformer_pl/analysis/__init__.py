"""Looking at trained networks and finished runs."""
