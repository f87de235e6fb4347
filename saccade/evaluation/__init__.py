"""Evaluations, their records, protocols and tables.

May import every room but `cli`.
"""
