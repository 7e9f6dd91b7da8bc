"""Judges of quality: what a number format costs, measured on text."""
