"""The old name of planning.devices."""

from ._moved import moved

moved(__name__, "planning.devices")
