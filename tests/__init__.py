"""Tests. A package, so that no other `tests` among the installed packages takes its name."""
