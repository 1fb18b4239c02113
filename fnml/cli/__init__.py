"""The command line: ``fnml train|resume|eval|sample|runs|laws|check|doctor|plugins``."""

from fnml.cli._main import main as main
