"""Gradients, norms, randomness, sampling, metrics and run folders.

Imports nothing else of the project.
"""
