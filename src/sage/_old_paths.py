"""Finds the modules that programs of 2025 import; their names are loaded when a program imports the first one."""

import sys
from importlib.machinery import ModuleSpec

OLD_ROOTS = frozenset(
    (
        "api",
        "common",
        "core",
        "foundation",
        "kernel",
        "lib",
        "libs",
        "middleware",
        "platform",
        "plugins",
        "runtime",
        "utils",
    )
)


class OldPaths:
    """Makes a module of an old path when a program imports it.

    It comes before the other finders, so that these modules are found here also where packages of the old system are
    installed in the same place.
    """

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Return how to make the module, or None if it is not one of an old program."""
        if not fullname.startswith("sage.") or fullname.split(".", 2)[1] not in OLD_ROOTS:
            return None
        from sage._legacy.names import is_old  # loads all of SAGE

        # Not derived from Loader: importlib.abc imports much that most programs never need.
        return ModuleSpec(fullname, self, is_package=True) if is_old(fullname) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system to make the module."""

    def exec_module(self, module: object) -> None:
        """Give the module the names that old programs import, and an error that helps for the others."""
        from sage._legacy.names import NAMES, missing

        names = vars(module)
        path = names["__name__"]

        def absent(name: str) -> object:
            raise missing(path, name)

        names.update(NAMES)
        names["__getattr__"] = absent


sys.meta_path.insert(0, OldPaths())
