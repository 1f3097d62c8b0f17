"""Libraries that only some services need: imported on use, and named with their extra where they are missing."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import TYPE_CHECKING

from sage.errors import ServiceError, hint

if TYPE_CHECKING:
    from types import ModuleType


# Services start side by side. Two threads that import modules which need each other wait for each other, and Python
# then shows one of them a module that is half imported.
_importing = threading.RLock()


class MissingExtraError(ServiceError, ImportError):
    """A library cannot be imported that is needed; it names the extra, and the note says how to install it."""


def load(module: str, extra: str) -> ModuleType:
    """Return a module of a library that SAGE itself does not require.

    Args:
        module: the module's full name, such as "chromadb.config".
        extra: the extra of SAGE that installs it, such as "chroma".

    Raises:
        MissingExtraError: it cannot be imported.
    """
    try:
        with _importing:
            return import_module(module)
    except ImportError as error:
        # Whoever shows the message alone shows the extra too.
        text = f'module "{module}" of the extra "{extra}" cannot be imported: {error}'
        missing = MissingExtraError(text, fault="user")
        raise hint(missing, f'Install it with: pip install "sage-dataflow[{extra}]"') from error
