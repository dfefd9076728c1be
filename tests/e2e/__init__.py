"""Checks on a real cluster, with kubectl and Python's own library alone: see README.md here."""
