"""The command line: ``fnml train|resume|eval|sample|runs|verify|replay|diff`` and more."""

from fnml.cli._main import main as main
