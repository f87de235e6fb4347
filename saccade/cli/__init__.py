"""What the command-line programs share; may import every room."""
