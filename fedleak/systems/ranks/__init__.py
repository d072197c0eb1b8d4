"""Numerical ranks of layers' systems ``U = [A; K(e)]``: dense, structured, counted, probed.

Nothing here knows a layer: a layer asks, with its operators or the geometry of its windows.
"""
