"""The old name of core.cost."""

from ._moved import moved

moved(__name__, "core.cost")
