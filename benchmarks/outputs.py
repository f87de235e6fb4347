"""Where the benchmarks write their records."""

import dataclasses
import pathlib
from typing import Any

from saccade.cli import command_line
from saccade.core import run_folder
from saccade.core.settings import setting


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the record of a benchmark goes."""

    output: str | None = setting(
        None, "JSON file to which the record is written.", "none"
    )

    def __post_init__(self) -> None:
        path = self.path
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(
                "Expected --output to be a file in a folder that exists. "
                f"Received: --output={path}."
            )

    @property
    def path(self) -> pathlib.Path | None:
        """The path of the file; None for no file."""
        return None if self.output is None else pathlib.Path(self.output)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record, if it is to go anywhere."""
        if self.path is not None:
            with command_line.guard():
                run_folder.write_json(self.path, record)
