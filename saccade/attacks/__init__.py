"""Attacks and how to run them; may import `core`, `data` and `models`."""
