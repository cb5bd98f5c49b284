"""A progress bar with the time left, where tqdm is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec


class Progress:
    """Counts steps; without tqdm, or where stderr is no terminal, it shows nothing."""

    def __init__(self, total: int | None, show: bool | None, desc: str = "calibration", unit: str = "block") -> None:
        self.bar = None
        if show or (show is None and sys.stderr.isatty() and find_spec("tqdm") is not None):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)

    def begin(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(name)

    def done(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
