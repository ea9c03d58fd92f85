"""Analysis of trained networks and of finished runs."""
