"""Data sets as files, splits and batches; may import `core`."""
