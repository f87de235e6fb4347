"""Figures from arrays.

May import every room but `evaluation` and `cli`.
"""
