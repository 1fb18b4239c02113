"""The command line: ``fnml train|resume|eval|sample|runs|doctor|plugins``."""

from fnml.cli._main import main as main
