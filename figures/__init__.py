"""Figures that the README and the documentation show, each written by the command that measures it."""
