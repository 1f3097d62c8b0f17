"""The common part of sources that may fail in the middle of a read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage.connector import Source

if TYPE_CHECKING:
    from types import GeneratorType
    from typing import Never


class HoldingSource(Source):
    """Hands on the records that it read before an error, and raises that at the next read.

    Attributes:
        held_error: the error, until it is raised.
        generator: the generator, if it reads one: it cannot go on after an error, and is closed in the end.
    """

    held_error: BaseException | None = None
    generator: GeneratorType[object, Never, object] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can come, as after an error of a generator."""
        return self.generator is not None and self.generator.gi_frame is None

    def raise_held(self) -> None:
        """Raise the error, if there is one."""
        error, self.held_error = self.held_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Close a generator, so that its `finally` runs now."""
        if self.generator is not None:
            self.generator.close()
