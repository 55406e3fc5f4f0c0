"""The old name of quality.draws."""

from ._moved import moved

moved(__name__, "quality.draws")
