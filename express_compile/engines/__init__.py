"""Rewritten models inside of engines that others wrote, by the interfaces those offer."""
