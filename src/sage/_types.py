"""The type variables of the public API, and the shapes of values that its signatures name.

Type checkers take `Any` for a type argument that a program leaves out, so `class F(MapFunction)` and `DataStream`
without brackets pass their strict modes. Python 3.11 cannot say so itself, hence the two definitions of `TypeVar`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing import Annotated, TypeAlias

    from typing_extensions import TypeVar, TypeVarTuple, Unpack
else:
    from typing import TypeVar as _TypeVar
    from typing import TypeVarTuple as _TypeVarTuple
    from typing import Unpack

    def TypeVar(name, **_):
        return _TypeVar(name)

    def TypeVarTuple(name, **_):
        return _TypeVarTuple(name)


A = TypeVar("A", default=Any)
B = TypeVar("B", default=Any)
K = TypeVar("K", default=Any)
T = TypeVar("T", default=Any)
U = TypeVar("U", default=Any)
V = TypeVar("V", default=Any)
Row = TypeVar("Row", bound=tuple[Any, ...])
K_co = TypeVar("K_co", covariant=True, default=Any)
T_co = TypeVar("T_co", covariant=True, default=Any)
U_co = TypeVar("U_co", covariant=True, default=Any)
V_co = TypeVar("V_co", covariant=True, default=Any)
A_contra = TypeVar("A_contra", contravariant=True, default=Any)
B_contra = TypeVar("B_contra", contravariant=True, default=Any)
Inputs = TypeVarTuple("Inputs", default=Unpack[tuple[Any, ...]])

if TYPE_CHECKING:
    ServiceHandle: TypeAlias = Annotated[T, "the handle of a service"]


class Processes(Protocol[A_contra, U_co]):
    """A service as a function: calling its handle calls `process`."""

    def process(self, record: A_contra, /) -> U_co:
        """Answer one record."""


class Awaited(Protocol[A_contra, U_co]):
    """A function class whose `execute` is a coroutine method."""

    async def execute(self, data: A_contra, /) -> U_co:
        """Return the record that takes the place of `data`."""


class CoMaps(Protocol[A_contra, B_contra, U_co, V_co]):
    """A function of two connected streams."""

    def map0(self, data: A_contra, /) -> U_co:
        """Map a record of the first stream."""

    def map1(self, data: B_contra, /) -> V_co:
        """Map a record of the second stream."""
