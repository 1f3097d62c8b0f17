"""The logger of old programs, on top of that of the standard library."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from sage.observability import LOG_FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterable


class CustomLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger of the standard library, `sage.user.<name>`, that writes to the outputs it is given.

    Args:
        outputs: pairs of "console" or a file, and the level from which on it is written to.
        name: the logger's name; two with the same name share their outputs.
        log_base_folder: where files with a relative path go.
    """

    _shows_console = True

    def __init__(
        self,
        outputs: Iterable[tuple[str, str | int]] = (("console", "INFO"),),
        name: str = "Logger",
        log_base_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(logging.getLogger(f"sage.user.{name}"), {})
        for target, level in outputs:
            handler = self._output(target, log_base_folder)
            handler.setLevel(level.upper() if isinstance(level, str) else level)
            if self.logger.level == logging.NOTSET or self.logger.level > handler.level:
                self.logger.setLevel(handler.level)

    @classmethod
    def disable_global_console_debug(cls) -> None:
        """Let no `CustomLogger` write to the console."""
        CustomLogger._shows_console = False

    @classmethod
    def enable_global_console_debug(cls) -> None:
        """Let every `CustomLogger` write to the console again."""
        CustomLogger._shows_console = True

    def _output(self, target: str, folder: str | os.PathLike[str] | None) -> logging.Handler:
        path = os.path.abspath(os.path.join(folder or "", target))
        name = f"{self.logger.name} to {target if target == 'console' else path}"
        for handler in self.logger.handlers:
            if handler.name == name:
                return handler
        if target == "console":
            handler = logging.StreamHandler()
            handler.addFilter(lambda _: CustomLogger._shows_console)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handler = logging.FileHandler(path, delay=True, encoding="utf-8")
        handler.name = name
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        self.logger.addHandler(handler)
        return handler


def get_logger(name: str = "Logger") -> CustomLogger:
    """Return a logger that writes to the console."""
    return CustomLogger(name=name)
