"""Finds the modules that programs of 2025 import; what they hold is loaded when the first one is asked for."""

import sys
from importlib.machinery import ModuleSpec

OLD_ROOTS = frozenset({"core", "kernel", "common", "platform", "runtime", "foundation"})


class OldPaths:
    """Makes the modules of the table in `_legacy` when a program imports one; until then there are none."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Return how to make the module, or None if it is not in the table."""
        parts = fullname.split(".", 2)
        if parts[0] != "sage" or len(parts) < 2 or parts[1] not in OLD_ROOTS:
            return None
        from sage._legacy import OLD_PATHS, PACKAGES  # loads all of SAGE

        if fullname not in OLD_PATHS and fullname not in PACKAGES:
            return None
        # Not derived from Loader: importlib.abc imports much that most programs never need.
        return ModuleSpec(fullname, self, is_package=fullname in PACKAGES)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system to make the module."""

    def exec_module(self, module: object) -> None:
        """Put the names into the module."""
        from sage._legacy import OLD_PATHS

        vars(module).update(OLD_PATHS.get(module.__name__, {}))  # type: ignore[attr-defined]


sys.meta_path.append(OldPaths())
