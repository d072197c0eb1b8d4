"""The commands of ``fedleak``, one file each: the roof of the house.

They alone may import ``simulations``, when they are called; nothing of the library imports them.
"""
