"""Packages that load their public names when a program first asks for them, so that importing one costs little."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy(package: str, names: dict[str, object], modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return the `__getattr__` of a package.

    Args:
        package: its full name.
        names: its namespace, which keeps each name that was loaded; it also gets `__all__` and `__dir__`.
        modules: its modules, each with the public names in it, separated by spaces.
    """
    homes = {name: module for module, listed in modules.items() for name in listed.split()}
    names["__all__"] = sorted(homes)
    names["__dir__"] = lambda: sorted({*homes, *names})

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(f".{homes[name]}", package), name)
        names[name] = value
        return value

    return load
