"""Nouns only: what a site computes, what the user wants, what was decided. Imports nothing above it."""
