"""The old name of core.method."""

from ._moved import moved

moved(__name__, "core.method")
