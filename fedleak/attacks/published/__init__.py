"""Attacks as their papers describe them: what ours are compared with."""
