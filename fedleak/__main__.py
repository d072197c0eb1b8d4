"""``python -m fedleak``."""

from fedleak.commands.app import main

main()
