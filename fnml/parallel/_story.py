"""The supervisor's log."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Story:
    """Tell what happens to a run's processes: a line on stderr, and one in the run's directory.

    ``supervisor.jsonl`` has an object per event, with ``time`` (UTC), ``event``, ``text`` and what
    else is known of it. Until the run's directory is known, lines wait for it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[str] = []

    def tell(self, event: str, text: str, **more: Any) -> None:
        """Add an event."""
        now = datetime.now(UTC)
        print(f"fnml launch: {now.astimezone():%H:%M:%S} {text}", file=sys.stderr, flush=True)
        time = now.isoformat(timespec="milliseconds")
        self._waiting.append(json.dumps({"time": time, "event": event, "text": text, **more}))
        self._write()

    def settle(self, directory: Path) -> None:
        """Say where the run's directory is."""
        self._path = directory / "supervisor.jsonl"
        self._write()

    def _write(self) -> None:
        if self._path is None or not self._waiting:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in self._waiting)
        except OSError:
            return  # stderr has it; the next event tries again
        self._waiting.clear()
