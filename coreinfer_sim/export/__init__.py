"""A cluster with its compact MLPs as an ordinary, smaller model that other programs load."""
