"""Judges of quality: what a number format or a KV policy costs, measured on text."""
