"""Networks and their registry; may import `core` and `data`."""
