"""The old name of routes.compile."""

from ._moved import moved

moved(__name__, "routes.compile")
