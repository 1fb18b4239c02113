"""``python -m fnml`` is the command line."""

from fnml.cli import main

main()
