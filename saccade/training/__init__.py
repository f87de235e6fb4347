"""Objectives, recipes, the training step and the training loop.

May import `core`, `data`, `models` and `attacks`.
"""
