"""What commands leave in folders: its format, written once and read once.

``format``: names and columns of all files. ``folder``: an output folder that can be gone on with.
``reading``: tables and JSON that may be damaged, older, or somebody else's. ``pictures``:
reconstructions of a round beside their truth. ``runs``: runs and evaluations read back.
``tampering``: the sums of a record of tampering.
"""
