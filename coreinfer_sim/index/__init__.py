"""Texts grouped by meaning: embedded, clustered, looked up, and kept in a checked folder."""
