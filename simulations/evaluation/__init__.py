"""Sweeps over defences: what each one costs, and what it really buys."""
