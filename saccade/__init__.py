"""Trains, attacks and explains image classifiers that look in glimpses."""
