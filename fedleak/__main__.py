"""``python -m fedleak``."""

from fedleak.cli import main

main()
