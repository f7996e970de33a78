"""Faults that are forced: see crash_points.py."""
