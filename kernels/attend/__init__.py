"""Attention over selected, weighted rows."""
