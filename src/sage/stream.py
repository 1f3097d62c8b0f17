"""Streams: you write a pipeline with them. Each method adds one node to the graph; nothing runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, Unpack, overload

from sage._arguments import check_count, check_seconds, copy_of_initial
from sage._compositions import (
    Limit,
    Sample,
    aggregating,
    comparing,
    count,
    distinct,
    itself,
    keeping_top,
    passing_on,
    printing,
)
from sage._handover import Handover, JobRunner
from sage._plan.logical import FunctionSpec, GraphBuilder, Kind, Route
from sage._plan.signature import async_spec, comap_spec, function_spec, place_of, plain_function
from sage._types import Inputs, K_co, T_co
from sage.connector import TransactionalSink
from sage.errors import GraphError, hint, short
from sage.failure import FAIL, POLICIES, ErrorPolicy, Retry
from sage.service import ServiceHandle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from typing import ParamSpec, Self, TypeAlias

    from sage import functions
    from sage._types import A, Awaited, B, CoMaps, K, Processes, Row, T, U, V

    P = ParamSpec("P")
    Results: TypeAlias = Iterable[U] | None
    OrErrors: TypeAlias = Iterable[U | BaseException]
    MapClass: TypeAlias = type[functions.MapFunction[T, U]]
    AsyncClass: TypeAlias = type[Awaited[T, U]]
    BatchClass: TypeAlias = type[functions.MapFunction[list[T], OrErrors[U]]]
    FilterClass: TypeAlias = type[functions.FilterFunction[T]]
    FlatMapClass: TypeAlias = type[functions.FlatMapFunction[T, U]]
    ProcessClass: TypeAlias = type[functions.ProcessFunction[T, U]]
    SinkClass: TypeAlias = type[functions.SinkFunction[T]]
    KeyByClass: TypeAlias = type[functions.KeyByFunction[T, K]]
    KeyFinder: TypeAlias = Callable[[Any], object] | functions.KeyByFunction | type[functions.KeyByFunction]
    OneRecord: TypeAlias = Callable[[T], U] | Processes[T, U]
    ManyRecords: TypeAlias = Callable[[T], Results[U] | Awaitable[Results[U]]] | Processes[T, Results[U]]
    # The type of the keys is not known after an operator that may change the record, as `keyby` stands before it.
    Keyed: TypeAlias = "KeyedStream[Any, U]"
    OfKey: TypeAlias = Callable[[Any], U]
    Pairs: TypeAlias = "KeyedStream[Any, tuple[Any, U]]"
    OnError: TypeAlias = "Literal['fail', 'skip'] | Retry | DataStream[object] | None"

Strategy = Literal["hash", "broadcast", "round_robin"]

At = Literal["cluster", "driver"]

Emit = Literal["each", "last"]

STRATEGIES = {"hash": Route.HASH, "broadcast": Route.BROADCAST, "round_robin": Route.ROUND_ROBIN}


class SourceOptions(TypedDict, total=False):
    """The keywords that sources and operators take; see `DataStream`."""

    parallelism: int | None
    name: str | None
    on_error: OnError


class OperatorOptions(SourceOptions, total=False):
    """The keywords that every operator takes; see `DataStream`."""

    capacity: int | None


def error_policy(builder: GraphBuilder, on_error: object) -> ErrorPolicy:
    """Return the user's `on_error` as the graph holds it.

    Raises:
        GraphError: it is not "fail", "skip", a `Retry` or a stream of dead letters.
    """
    if on_error is None:
        return FAIL
    if isinstance(on_error, Retry):
        last = error_policy(builder, on_error.then)
        return ErrorPolicy(last.then, last.letters, on_error)
    if isinstance(on_error, str) and on_error in POLICIES:
        return ErrorPolicy(on_error)
    if isinstance(on_error, DataStream):
        _check_stream(builder, "on_error", on_error)
    if isinstance(on_error, DataStream) and builder.node(on_error._id).kind is Kind.LETTERS:
        return ErrorPolicy("letters", on_error._id)
    error = GraphError(f"on_error is {on_error!r}")
    raise hint(error, 'It is "fail", "skip", Retry(...) or a stream of env.dead_letters(name).')


class DataStream(Generic[T_co]):
    """A stream of records. A stream used twice sends every record to both branches.

    Every method takes a function class with its constructor's arguments after it, an instance, or a callable (also a
    coroutine function), and by keyword:

        parallelism: how many tasks run the operator (default 1).
        name: the operator's name in reports, logs and errors.
        on_error: the policy if the function raises on a record: "fail" (the job; default), "skip" (the record),
            a `Retry`, or a stream of `Environment.dead_letters`.
        capacity: how many records may wait before the operator, in a queue of its own. By default, neighbours of equal
            parallelism hand records over without a queue, and a queue holds at most as many as the operator works
            through in about a second. A function class that takes a `capacity` gets it instead of the operator.
    """

    def __init__(self, builder: GraphBuilder, id_: int) -> None:
        self._builder = builder
        self._id = id_

    def _then(
        self,
        kind: Kind,
        spec: FunctionSpec | None,
        options: Mapping[str, object],
        *,
        route: Route | None = None,
        inputs: tuple[int, ...] | None = None,
        **settings: object,
    ) -> int:
        _check_states(self._builder, spec, (self,))
        return self._builder.add(
            kind,
            name=options.get("name"),
            inputs=inputs or (self._id,),
            function=spec,
            parallelism=options.get("parallelism"),
            on_error=error_policy(self._builder, options.get("on_error")),
            route=route,
            settings=settings if spec is None or spec.capacity is None else {**settings, "capacity": spec.capacity},
        )

    def _apply(self, kind: Kind, function: object, args: tuple[object, ...], options: dict[str, object]) -> Self:
        """Return the stream after an operator that does not have settings."""
        common, kwargs = options_and_arguments(options)
        return self._stream(self._then(kind, function_spec(kind, function, args, kwargs), common))

    @overload
    def map(
        self, function: MapClass[T_co, U], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map(self, function: MapClass[T_co, U], *args: object, name: str | None, **kwargs: object) -> DataStream[U]: ...
    @overload
    def map(self, function: MapClass[T_co, U], *args: object, on_error: OnError, **kwargs: object) -> DataStream[U]: ...
    @overload
    def map(
        self, function: MapClass[T_co, U], *args: object, capacity: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map(
        self, function: Callable[P, functions.MapFunction[T_co, U]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[U]: ...
    @overload
    def map(self, function: Callable[[T_co], Awaitable[U]], **options: Unpack[OperatorOptions]) -> DataStream[U]: ...
    @overload
    def map(
        self, function: OneRecord[T_co, U] | functions.MapFunction[T_co, U], **options: Unpack[OperatorOptions]
    ) -> DataStream[U]: ...
    def map(self, function: object, *args: object, **options: object) -> object:
        """Replace each record with the return value of `function`.

        A plain callable's None is data; a `MapFunction` that returns None drops the record. The key is kept.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.map(lambda x: x * 10))
        [10, 20, 30]
        """
        return self._apply(Kind.MAP, function, args, options)

    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, name: str | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, on_error: OnError, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, capacity: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, concurrency: int, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, ordered: bool, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, timeout_s: float | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: AsyncClass[T_co, U], *args: object, retry: Retry | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self, function: Callable[P, Awaited[T_co, U]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[U]: ...
    @overload
    def map_async(
        self,
        function: Callable[[T_co], Awaitable[U]] | Awaited[T_co, U] | Processes[T_co, Awaitable[U]],
        *,
        concurrency: int = 16,
        ordered: bool = True,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        **options: Unpack[OperatorOptions],
    ) -> DataStream[U]: ...
    def map_async(
        self,
        function: object,
        *args: object,
        concurrency: object = 16,
        ordered: object = True,
        timeout_s: object = None,
        retry: object = None,
        **options: object,
    ) -> object:
        """Replace each record with the result of the coroutine function `function`, many records at a time.

        The coroutines run on the event loop of the job. While one awaits, the others run; a coroutine that blocks,
        blocks all of them. A result goes on as soon as it is ready, or with `ordered` when the results of all earlier
        records are. When a job is cancelled or fails, the coroutines that run are cancelled and awaited before
        `close()` of the function.

        Args:
            function: a coroutine function, a class or instance with `async def execute`, or a method of a service. A
                `MapFunction` that returns None drops the record, and `self.ctx.get_key()` tells a coroutine the key of
                its own record.
            *args: arguments of a function class.
            concurrency: how many records each task has in the function at a time, those included that wait for their
                next attempt. No more results wait to go on, so that a slow record holds up at most as many.
            ordered: whether results keep the order of their records.
            timeout_s: how long each attempt may take, in seconds; it fails with `TimeoutError` then.
            retry: how often a record is tried, with which pauses; `on_error` applies after the last attempt.
            **options: see the class, and keyword arguments of a function class.

        Raises:
            GraphError: `function` is not a coroutine function, or a number cannot work.

        >>> from sage.testing import run
        >>> async def double(x): return x * 2
        >>> run([1, 2, 3], lambda stream: stream.map_async(double, concurrency=2))
        [2, 4, 6]
        """
        check_count("map_async: concurrency is", concurrency)
        if timeout_s is not None:
            check_seconds("map_async: timeout_s is", timeout_s, may_be_zero=False)
        common, kwargs = options_and_arguments(options)
        common["on_error"] = _with_retry("map_async", retry, common.get("on_error"))
        id_ = self._then(
            Kind.MAP_ASYNC,
            async_spec(function, args, kwargs),
            common,
            concurrency=concurrency,
            ordered=ordered,
            timeout_s=timeout_s,
        )
        return self._stream(id_)

    @overload
    def map_batches(
        self,
        function: OneRecord[Any, object] | functions.MapFunction | type[functions.MapFunction],
        *args: object,
        batch_format: Literal["numpy"],
        **kwargs: object,
    ) -> DataStream: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, name: str | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, on_error: OnError, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, capacity: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, max_records: int, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: BatchClass[T_co, U], *args: object, max_wait_s: float, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self, function: Callable[P, functions.MapFunction[list[T_co], OrErrors[U]]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[U]: ...
    @overload
    def map_batches(
        self,
        function: OneRecord[list[T_co], OrErrors[U] | Awaitable[OrErrors[U]]]
        | functions.MapFunction[list[T_co], OrErrors[U]],
        *,
        max_records: int = 64,
        max_wait_s: float = 0.0,
        batch_format: Literal["list"] = "list",
        **options: Unpack[OperatorOptions],
    ) -> DataStream[U]: ...
    def map_batches(
        self,
        function: object,
        *args: object,
        max_records: object = 64,
        max_wait_s: object = 0.0,
        batch_format: object = "list",
        **options: object,
    ) -> object:
        """Call `function` with batches of records; it returns one result for each record, in order.

        Keys are kept. When the function raises, or returns another number of results, the batch as a whole has failed:
        `on_error` concerns every record of it. `Retry` calls the function again with the same batch, "skip" drops all
        of its records, and each of them becomes a dead letter of its own. An exception in the place of a result, as
        `asyncio.gather(..., return_exceptions=True)` has them, is the failure of that record alone: the others go on,
        once `Retry`, which knows whole batches only, has called the function with all of them again.

        Args:
            function: takes a list or an array of 1 to `max_records` records, and returns a list, a tuple or an array.
            *args: arguments of a function class.
            max_records: how many records a batch has at most.
            max_wait_s: how long a record may wait for the batch to fill, in seconds; with 0, a batch takes the records
                that have arrived. The end of the stream ends the waiting.
            batch_format: "list", or "numpy" for `numpy.asarray` of the records; numpy has to be installed then.
            **options: see the class, and keyword arguments of a function class.

        Raises:
            GraphError: the function cannot be called with one argument, or an option cannot work.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.map_batches(lambda batch: [x * 2 for x in batch], max_records=2))
        [2, 4, 6]
        """
        check_count("map_batches: max_records is", max_records)
        check_seconds("map_batches: max_wait_s is", max_wait_s)
        if batch_format not in ("list", "numpy"):
            raise hint(GraphError(f"map_batches: batch_format is {batch_format!r}"), 'It is "list" or "numpy".')
        common, kwargs = options_and_arguments(options)
        id_ = self._then(
            Kind.MAP_BATCHES,
            function_spec(Kind.MAP_BATCHES, function, args, kwargs),
            common,
            max_records=max_records,
            max_wait_s=max_wait_s,
            batch_format=batch_format,
        )
        return self._stream(id_)

    @overload
    def filter(self, function: FilterClass[T_co], *args: object, parallelism: int | None, **kwargs: object) -> Self: ...
    @overload
    def filter(self, function: FilterClass[T_co], *args: object, name: str | None, **kwargs: object) -> Self: ...
    @overload
    def filter(self, function: FilterClass[T_co], *args: object, on_error: OnError, **kwargs: object) -> Self: ...
    @overload
    def filter(self, function: FilterClass[T_co], *args: object, capacity: int | None, **kwargs: object) -> Self: ...
    @overload
    def filter(
        self, function: Callable[P, functions.FilterFunction[T_co]], *args: P.args, **kwargs: P.kwargs
    ) -> Self: ...
    @overload
    def filter(
        self, function: OneRecord[T_co, object] | functions.FilterFunction[T_co], **options: Unpack[OperatorOptions]
    ) -> Self: ...
    def filter(self, function: object, *args: object, **options: object) -> object:
        """Keep the records for which `function` returns something true.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.filter(lambda x: x > 1))
        [2, 3]
        """
        return self._apply(Kind.FILTER, function, args, options)

    @overload
    def flatmap(
        self, function: FlatMapClass[T_co, U], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def flatmap(
        self, function: FlatMapClass[T_co, U], *args: object, name: str | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def flatmap(
        self, function: FlatMapClass[T_co, U], *args: object, on_error: OnError, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def flatmap(
        self, function: FlatMapClass[T_co, U], *args: object, capacity: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def flatmap(
        self, function: Callable[P, functions.FlatMapFunction[T_co, U]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[U]: ...
    @overload
    def flatmap(
        self, function: ManyRecords[T_co, U] | functions.FlatMapFunction[T_co, U], **options: Unpack[OperatorOptions]
    ) -> DataStream[U]: ...
    def flatmap(self, function: object, *args: object, **options: object) -> object:
        """Replace each record with those passed to `self.collect`, then those that `function` returns or yields.

        A generator is read as far as there is room downstream, so it may be long or endless.

        >>> from sage.testing import run
        >>> run(["a b", "c"], lambda stream: stream.flatmap(str.split))
        ['a', 'b', 'c']
        """
        return self._apply(Kind.FLATMAP, function, args, options)

    flat_map = flatmap

    @overload
    def process(
        self, function: ProcessClass[T_co, U], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def process(
        self, function: ProcessClass[T_co, U], *args: object, name: str | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def process(
        self, function: ProcessClass[T_co, U], *args: object, on_error: OnError, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def process(
        self, function: ProcessClass[T_co, U], *args: object, capacity: int | None, **kwargs: object
    ) -> DataStream[U]: ...
    @overload
    def process(
        self, function: Callable[P, functions.ProcessFunction[T_co, U]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[U]: ...
    @overload
    def process(
        self, function: ManyRecords[T_co, U] | functions.ProcessFunction[T_co, U], **options: Unpack[OperatorOptions]
    ) -> DataStream[U]: ...
    def process(self, function: object, *args: object, **options: object) -> object:
        """Run a `ProcessFunction`: a flat map that may also emit when its input has ended, by `finish()`.

        >>> from sage.testing import run
        >>> run([1, 2], lambda stream: stream.process(lambda x: [x, -x]))
        [1, -1, 2, -2]
        """
        return self._apply(Kind.PROCESS, function, args, options)

    @overload
    def sink(self, function: SinkClass[T_co], *args: object, parallelism: int | None, **kwargs: object) -> Self: ...
    @overload
    def sink(self, function: SinkClass[T_co], *args: object, name: str | None, **kwargs: object) -> Self: ...
    @overload
    def sink(self, function: SinkClass[T_co], *args: object, on_error: OnError, **kwargs: object) -> Self: ...
    @overload
    def sink(self, function: SinkClass[T_co], *args: object, capacity: int | None, **kwargs: object) -> Self: ...
    @overload
    def sink(self, function: SinkClass[T_co], *args: object, at: At | None, **kwargs: object) -> Self: ...
    @overload
    def sink(self, function: Callable[P, functions.SinkFunction[T_co]], *args: P.args, **kwargs: P.kwargs) -> Self: ...
    @overload
    def sink(
        self,
        function: OneRecord[T_co, object] | functions.SinkFunction[T_co] | TransactionalSink[T_co],
        *,
        at: At | None = None,
        **options: Unpack[OperatorOptions],
    ) -> Self: ...
    def sink(self, function: object, *args: object, at: object = None, **options: object) -> object:
        """Hand each record to `function` and return this stream, so that chaining goes on from before the sink.

        `close()` of a `SinkFunction` is called once after the last record, however the job ends. On a cluster, a method
        of a list, a set, a dict, a deque or a queue, such as `results.append`, is called in the driver, where the
        program can see the result; so is any other function with `at="driver"`.

        A `TransactionalSink` gets batches, and its records appear with the checkpoints of a durable job.

        >>> from sage.testing import run
        >>> seen = []
        >>> run([1, 2], lambda stream: stream.sink(seen.append)) == seen
        True
        """
        common, kwargs = options_and_arguments(options)
        id_ = self._then(Kind.SINK, function_spec(Kind.SINK, function, args, kwargs), common)
        if isinstance(function, TransactionalSink) and self._builder.node(id_).on_error != FAIL:
            error = GraphError(f'sink "{self._builder.node(id_).name}" has transactions and takes no on_error')
            raise hint(error, "It writes many records at once; retry inside write(), and let real errors fail the job.")
        if at is not None:
            self._builder.set(id_, place=place_of(at))
        return self

    def print(self, prefix: str = "", separator: str = " | ", colored: bool = True) -> DataStream:
        """Print every record and return this stream.

        Args:
            prefix: the text before each record.
            separator: the text between prefix and record.
            colored: whether the prefix is dimmed on a terminal.
        """
        id_ = self._then(Kind.SINK, FunctionSpec(printing(prefix, separator, colored)), {})
        self._builder.set(id_, place=place_of("driver"))
        return self

    def collect(self) -> list[T_co]:
        """Run the environment's pipeline, and return the records that arrive here as a list.

        Everything that is registered and every other branch runs with it, and all is cleaned up at the end.

        Raises:
            GraphError: the program is wrong, or the environment runs a job already.
            JobError: the job failed; several errors come as one `JobErrorGroup`.

        >>> from sage import LocalEnvironment
        >>> LocalEnvironment().from_batch([1, 2, 3]).map(lambda x: x * 2).collect()
        [2, 4, 6]
        """
        arrived: list[T_co] = []
        with self._sink_for_now(arrived.append) as environment:
            environment.submit(autostop=True)
        return arrived

    def iterate(self) -> Generator[T_co]:
        """Run the environment's pipeline, and yield the records that arrive here while it runs.

        The job begins with the first record that is asked for. It ends, and everything is cleaned up, when the loop is
        left, also by `break` or an exception; records in flight are dropped then. A slow loop slows the pipeline down.

        Raises:
            GraphError: the program is wrong, or the environment runs a job already.
            JobError: the job failed; raised after the records that arrived before.

        >>> from sage import LocalEnvironment
        >>> next(LocalEnvironment().from_source(lambda: 7).iterate())
        7
        """
        handover: Handover[T_co] = Handover()
        with self._sink_for_now(handover.put) as environment:
            yield from handover.results_of(environment)

    @contextmanager
    def _sink_for_now(self, take: Callable[[T_co], object]) -> Iterator[JobRunner]:
        """Add a sink in the driver for one job, and yield the environment."""
        id_ = self._then(Kind.SINK, function_spec(Kind.SINK, take, (), {}), {})
        self._builder.set(id_, place=place_of("driver"))
        try:
            yield self._builder.environment
        finally:
            self._builder.remove(id_)

    def branch(self, **predicates: Callable[[T_co], object]) -> dict[str, Self]:
        """Return a stream for each predicate, by its name, of the records for which it returns something true.

        A record goes to every stream whose predicate is true of it, and to none if all are false.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.branch(odd=lambda x: x % 2, even=lambda x: x % 2 == 0)["odd"])
        [1, 3]
        """
        return {name: self.filter(predicate, name=name) for name, predicate in predicates.items()}

    def tap(self, function: Callable[[T_co], object], **options: Unpack[OperatorOptions]) -> Self:
        """Call `function` with each record, and pass the record on unchanged; the return value is ignored.

        >>> from sage.testing import run
        >>> seen = []
        >>> run([1, 2], lambda stream: stream.tap(seen.append).map(lambda x: x * 2)), seen
        ([2, 4], [1, 2])
        """
        if hasattr(function, "execute") and not isinstance(function, ServiceHandle):
            error = GraphError(f"tap: {short(function)} is a function class or an instance of one")
            raise hint(error, "Give a plain function. sink(...) takes function classes, and returns the stream too.")
        function_spec(Kind.MAP, function, (), {})  # whose errors name the function, and not that around it
        return self._apply(Kind.MAP, passing_on(function), (), dict(options))

    def limit(self, count: int, *, name: str | None = None) -> Self:
        """Let the first `count` records pass, and drop the others.

        The sources are read to their end nevertheless. To end the job of an endless one, leave a loop over `iterate()`.

        >>> from sage.testing import run
        >>> run(range(10), lambda stream: stream.limit(2))
        [0, 1]
        """
        check_count("limit: count is", count, least=0)
        return self.filter(Limit, count, name=name)

    def sample(self, fraction: float, *, seed: int | None = None, name: str | None = None) -> Self:
        """Let a random part of the records pass, and drop the others.

        Args:
            fraction: the fraction of records to keep on average, from 0 to 1.
            seed: the seed of the draw; with the same seed and order, a task draws the same records.
            name: see the class.

        >>> from sage.testing import run
        >>> 300 < len(run(range(1000), lambda stream: stream.sample(0.5, seed=1))) < 700
        True
        """
        given: object = fraction
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise hint(GraphError(f"sample: fraction is {short(fraction)}"), "Give a number from 0 to 1.")
        return self.filter(Sample, fraction, seed, name=name)

    def place(
        self,
        at: Literal["cluster", "driver"] = "cluster",
        *,
        num_cpus: float = 0.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
    ) -> Self:
        """Say where on a cluster the operator before this runs; on one machine there is only one place.

        Args:
            at: "driver" keeps it in the process that submits the job.
            num_cpus: processors that each of its tasks reserves; with something reserved, each has its own process.
            num_gpus: GPUs that each of its tasks reserves and sees.
            resources: other resources of the cluster that each of its tasks reserves, by name.

        Raises:
            GraphError: it cannot be placed so.
        """
        self._builder.set(self._id, place=place_of(at, num_cpus, num_gpus, resources))
        return self

    @overload
    def keyby(
        self, function: KeyByClass[T_co, K], *args: object, parallelism: int | None, **kwargs: object
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self, function: KeyByClass[T_co, K], *args: object, name: str | None, **kwargs: object
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self, function: KeyByClass[T_co, K], *args: object, on_error: OnError, **kwargs: object
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self, function: KeyByClass[T_co, K], *args: object, capacity: int | None, **kwargs: object
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self, function: KeyByClass[T_co, K], *args: object, strategy: Strategy, **kwargs: object
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self, function: Callable[P, functions.KeyByFunction[T_co, K]], *args: P.args, **kwargs: P.kwargs
    ) -> KeyedStream[K, T_co]: ...
    @overload
    def keyby(
        self,
        function: OneRecord[T_co, K] | functions.KeyByFunction[T_co, K],
        strategy: Strategy = "hash",
        **options: Unpack[OperatorOptions],
    ) -> KeyedStream[K, T_co]: ...
    def keyby(self, function: object, *args: object, strategy: object = "hash", **options: object) -> KeyedStream:
        """Give each record the key that `function` finds in it.

        Args:
            function: finds the key. The same key goes to the same task in every process and on every run; 0, "", False
                and None are keys like others. Keys that are equal in Python, such as 1 and 1.0, are one key.
            *args: arguments of a function class; a strategy may stand first, as in older programs.
            strategy: "hash" by key, "broadcast" to every task, "round_robin".
            **options: see the class, and keyword arguments of a function class.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.keyby(lambda x: x % 2).reduce(lambda a, b: a + b))
        [1, 2, 4]
        """
        if args and args[0] in STRATEGIES:
            strategy, args = args[0], args[1:]
        return self._keyby(function, args, strategy, options)

    def _keyby(
        self, function: object, args: tuple[object, ...], strategy: object, options: dict[str, object]
    ) -> KeyedStream:
        if not isinstance(strategy, str) or strategy not in STRATEGIES:
            error = GraphError(f"keyby: strategy is {strategy!r}")
            raise hint(error, f"It is one of {', '.join(STRATEGIES)}.")
        common, kwargs = options_and_arguments(options)
        spec = function_spec(Kind.KEYBY, function, args, kwargs)
        return KeyedStream(self._builder, self._then(Kind.KEYBY, spec, common, route=STRATEGIES[strategy]))

    key_by = keyby

    @overload
    def reduce(
        self,
        function: Callable[[T_co, T_co], T_co | Awaitable[T_co]],
        *,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Keyed[T_co]: ...
    @overload  # `(word, 1)` is a pair of a string and the literal 1 to some type checkers, and a sum is not
    def reduce(
        self: DataStream[tuple[Any, ...]],
        function: Callable[[T_co, T_co], Row],
        *,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Keyed[Row]: ...
    def reduce(
        self,
        function: object,
        *,
        emit: Emit = "each",
        **options: object,
    ) -> object:
        """Combine the records of each key: `function(so_far, record)`, starting with the key's first record.

        The stream has to be keyed.

        Args:
            function: takes the combined value so far and the next record.
            emit: "each" emits the combined value after every record, "last" once for each key at the end.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or `emit` is neither.

        >>> from sage.testing import run
        >>> run(list("abab"), lambda stream: stream.keyby(lambda x: x).reduce(lambda a, b: a + b, emit="last"))
        ['aa', 'bb']
        """
        _check_emit("reduce", emit)
        _check_keyed(self._builder, "reduce: the stream", self)
        common, unknown = options_and_arguments(options)
        spec = function_spec(Kind.REDUCE, function, (), unknown)
        return KeyedStream(self._builder, self._then(Kind.REDUCE, spec, common, emit_each=emit == "each"))

    def stateful_map(
        self,
        function: Callable[[V, T_co], tuple[V, U] | Awaitable[tuple[V, U]]],
        initial: V,
        **options: Unpack[OperatorOptions],
    ) -> Keyed[U]:
        """Replace each record with a result that also depends on the earlier records of its key.

        Emits the result of each record at once. The stream has to be keyed.

        Args:
            function: takes the state of the key and the record, and returns `(state, result)`. If it raises, the state
                stays, so make a new state rather than change the old one if a record may fail.
            initial: the state of a key before its first record; each key begins with a copy.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or `initial` cannot be copied, or is a class or a function.

        >>> from sage.testing import run
        >>> run([5, 7, 4], lambda stream: stream.keyby(lambda x: 0).stateful_map(lambda old, x: (x, x - old), 0))
        [5, 2, -3]
        """
        return self._stateful("stateful_map", function, initial, "result", dict(options))

    def count(self, *, emit: Emit = "each", **options: Unpack[OperatorOptions]) -> Pairs[int]:
        """Count the records of each key. The stream has to be keyed.

        Args:
            emit: "each" emits `(key, count)` after every record, "last" once for each key at the end.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or `emit` is neither.

        >>> from sage.testing import run
        >>> run(list("abab"), lambda stream: stream.keyby(lambda x: x).count(emit="last"))
        [('a', 2), ('b', 2)]
        """
        return self._stateful("count", count, 0, "pair", dict(options), emit=emit)

    @overload
    def aggregate(
        self,
        initial: V,
        add: Callable[[V, T_co], V],
        *,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Pairs[V]: ...
    @overload
    def aggregate(
        self,
        initial: V,
        add: Callable[[V, T_co], V],
        result: Callable[[V], U],
        *,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Pairs[U]: ...
    @overload  # `(0, 0)` is a pair of the literal 0 to some type checkers, and a sum is not
    def aggregate(
        self,
        initial: tuple[Any, ...],
        add: Callable[[Any, T_co], tuple[Any, ...]],
        result: Callable[[Any], U],
        *,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Pairs[U]: ...
    def aggregate(
        self,
        initial: V,
        add: Callable[[V, T_co], V],
        result: Callable[[V], object] = itself,
        *,
        emit: Emit = "each",
        **options: object,
    ) -> KeyedStream:
        """Combine the records of each key, beginning with `initial`. The stream has to be keyed.

        Args:
            initial: the value of a key before its first record; each key begins with a copy.
            add: takes the value so far and the next record, and returns the new value.
            result: takes the value, and returns the result to emit, by default the value itself. Make it return a copy
                if `add` changes the value instead of making a new one.
            emit: "each" emits `(key, result)` after every record, "last" once for each key at the end.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or an argument cannot work.

        >>> from sage.testing import run
        >>> mean = dict(initial=(0, 0), add=lambda s, x: (s[0] + x, s[1] + 1), result=lambda s: s[0] / s[1])
        >>> run([1, 2, 3, 5], lambda stream: stream.keyby(lambda x: x % 2).aggregate(**mean, emit="last"))
        [(1, 3.0), (0, 2.0)]
        """
        return self._aggregate("aggregate", initial, add, result, emit, options)

    def top_k(
        self,
        k: int,
        *,
        by: Callable[[T_co], Any] = itself,
        emit: Emit = "each",
        **options: Unpack[OperatorOptions],
    ) -> Pairs[list[T_co]]:
        """Find the `k` greatest records of each key. The stream has to be keyed.

        Args:
            k: how many.
            by: takes a record and returns the value to compare, by default the record itself. Of equal ones, the first
                that came stands first.
            emit: "each" emits `(key, records)` after every record, the greatest first, "last" once for each key at the
                end.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or an argument cannot work.

        >>> from sage.testing import run
        >>> run([3, 9, 5], lambda stream: stream.keyby(lambda x: "all").top_k(2, emit="last"))
        [('all', [9, 5])]
        """
        check_count("top_k: k is", k)
        by = plain_function("top_k: by", by, 1)
        none: list[T_co] = []
        return self._aggregate("top_k", none, keeping_top(k, by), list, emit, dict(options))

    def distinct(self, **options: Unpack[OperatorOptions]) -> Keyed[T_co]:
        """Let the first record of each key pass, and drop the others. The stream has to be keyed.

        Emits a record as soon as it comes. Every key that has come is remembered.

        Raises:
            GraphError: the stream has no keys.

        >>> from sage.testing import run
        >>> run(["tea", "milk", "tea"], lambda stream: stream.keyby(lambda word: word).distinct())
        ['tea', 'milk']
        """
        return self._stateful("distinct", distinct, False, "record", dict(options))

    @overload
    def changed(
        self, *, fingerprint: Callable[[T_co], object] = itself, **options: Unpack[OperatorOptions]
    ) -> Keyed[T_co]: ...
    @overload
    def changed(
        self,
        *,
        fingerprint: Callable[[T_co], object] = itself,
        removed: OfKey[U],
        **options: Unpack[OperatorOptions],
    ) -> Keyed[T_co | U]: ...
    def changed(
        self,
        *,
        fingerprint: Callable[[T_co], object] = itself,
        removed: OfKey[object] | None = None,
        **options: object,
    ) -> KeyedStream:
        """Let a record pass if it is the first of its key, or differs from the one before; the stream has to be keyed.

        Emits a record as soon as it comes. In a durable job, the one before may have come in an earlier run.

        Args:
            fingerprint: takes a record and returns the value to compare and to remember, such as a time of change or a
                hash, by default the whole record.
            removed: takes a key that earlier runs of a durable job had and this one has not, and returns the record to
                emit for it. The sources before it are read from the beginning in each run. It is called when all of
                them have ended by themselves, and not if the job was stopped or if a record failed before it came here.
            **options: see the class.

        Raises:
            GraphError: the stream has no keys, or a function is not one of one argument.

        >>> from sage.testing import run
        >>> run([("a", 1), ("b", 1), ("a", 1), ("a", 2)], lambda stream: stream.keyby(lambda row: row[0]).changed())
        [('a', 1), ('b', 1), ('a', 2)]
        """
        find = plain_function("changed: fingerprint", fingerprint, 1)
        then = None if removed is None else plain_function("changed: removed", removed, 1)
        return self._stateful("changed", comparing(find), None, "record", dict(options), removed=then)

    def _aggregate(
        self,
        method: str,
        initial: V,
        add: Callable[[V, T_co], V],
        result: Callable[[V], object],
        emit: Emit,
        options: dict[str, object],
    ) -> KeyedStream:
        """Return the stream of keys and combined values."""
        add, result = plain_function(f"{method}: add", add, 2), plain_function(f"{method}: result", result, 1)
        function = aggregating(add, result if emit == "each" else itself)
        return self._stateful(method, function, initial, "pair", options, emit=emit, result=result)

    def _stateful(
        self,
        method: str,
        function: object,
        initial: object,
        form: str,
        options: dict[str, object],
        emit: Emit = "each",
        result: object = itself,
        removed: object = None,
    ) -> KeyedStream:
        """Return the stream after an operator that calls a function with the state of each key."""
        _check_emit(method, emit)
        _check_keyed(self._builder, f"{method}: the stream", self)
        common, unknown = options_and_arguments(options)
        spec = function_spec(Kind.STATEFUL_MAP, function, (), unknown)
        id_ = self._then(
            Kind.STATEFUL_MAP,
            spec,
            common,
            initial=copy_of_initial(f"{method}: initial", initial),
            form=form,
            emit_each=emit == "each",
            result=result,
            removed=removed,
        )
        return KeyedStream(self._builder, id_)

    def broadcast(self) -> Self:
        """Send every record to all parallel tasks of the next operator."""
        return self._stream(self._then(Kind.UNION, None, {}, route=Route.BROADCAST))

    def rebalance(self) -> Self:
        """Spread the records evenly over the parallel tasks of the next operator, regardless of their keys."""
        return self._stream(self._then(Kind.UNION, None, {}, route=Route.ROUND_ROBIN))

    def union(self, *others: DataStream[U]) -> DataStream[T_co | U]:
        """Return one stream of the records of this one and of the others; each keeps its own order."""
        for other in others:
            _check_stream(self._builder, "union", other)
        keyed = all(isinstance(stream, KeyedStream) for stream in (self, *others))
        id_ = self._then(Kind.UNION, None, {}, inputs=(self._id, *(other._id for other in others)))
        return (KeyedStream if keyed else DataStream)(self._builder, id_)

    @overload
    def connect(self, other: DataStream[U]) -> ConnectedStreams[T_co, U]: ...
    @overload
    def connect(self, other: ConnectedStreams[*Inputs]) -> ConnectedStreams[T_co, *Inputs]: ...
    def connect(self, other: DataStream[object] | ConnectedStreams) -> ConnectedStreams:
        """Return this stream and another as the inputs of one operator."""
        return ConnectedStreams(self._builder, (self,)).connect(other)

    def fill_future(self, future: DataStream[object]) -> None:
        """Lead this stream back into `future`, a stream of `Environment.from_future`.

        Raises:
            GraphError: it is not a future, or was filled before.
        """
        _check_stream(self._builder, "fill_future", future)
        self._builder.fill(self._id, future._id)

    def name(self, name: str) -> Self:
        """Give the operator behind this stream a name and return the stream.

        Raises:
            DuplicateNameError: another operator has it.
        """
        self._builder.rename(self._id, name)
        return self

    def _stream(self, id_: int) -> Self:
        """Return the stream of a new node; it is keyed where this one is."""
        return type(self)(self._builder, id_)


class KeyedStream(DataStream[T_co], Generic[K_co, T_co]):
    """A stream whose records have keys; `self.ctx.get_key()` in a function class tells that of the record in hand."""


class ConnectedStreams(Generic[*Inputs]):
    """Two or more streams as the inputs of one operator, which ends when all of them have ended."""

    def __init__(self, builder: GraphBuilder, streams: tuple[DataStream[object], ...]) -> None:
        self._builder = builder
        self._streams = streams

    @overload
    def connect(self, other: DataStream[U]) -> ConnectedStreams[*Inputs, U]: ...
    @overload
    def connect(self, other: ConnectedStreams[*tuple[object, ...]]) -> ConnectedStreams: ...
    def connect(self, other: DataStream[object] | ConnectedStreams) -> ConnectedStreams:
        """Return these streams and another."""
        more: tuple[DataStream[object], ...] = other._streams if isinstance(other, ConnectedStreams) else (other,)
        for stream in more:
            _check_stream(self._builder, "connect", stream)
        return ConnectedStreams(self._builder, (*self._streams, *more))

    @overload
    def comap(
        self: ConnectedStreams[A, B], function: type[CoMaps[A, B, U, V]], *args: object, **options: object
    ) -> DataStream[U | V]: ...
    @overload
    def comap(
        self: ConnectedStreams[A, B], function: CoMaps[A, B, U, V], **options: Unpack[OperatorOptions]
    ) -> DataStream[U | V]: ...
    @overload
    def comap(
        self: ConnectedStreams[A, B],
        first: Callable[[A], U],
        second: Callable[[B], V],
        /,
        **options: Unpack[OperatorOptions],
    ) -> DataStream[U | V]: ...
    @overload
    def comap(self, function: Sequence[Callable[..., U]], **options: Unpack[OperatorOptions]) -> DataStream[U]: ...
    @overload
    def comap(
        self: ConnectedStreams[A, B, T, *tuple[object, ...]], function: object, *args: object, **options: object
    ) -> DataStream: ...
    def comap(self, function: object, *args: object, **options: object) -> object:
        """Map each input by a method of its own: `map0`, `map1`, ..., or by one callable for each input."""
        common, kwargs = options_and_arguments(options)
        return self._join(Kind.COMAP, comap_spec(function, args, kwargs, len(self._streams)), common)

    @overload
    def join(
        self: ConnectedStreams[A, B],
        function: type[functions.BaseJoinFunction[A | B, Any, U]],
        *args: object,
        **options: object,
    ) -> DataStream[U]: ...
    @overload
    def join(
        self: ConnectedStreams[A, B],
        function: Callable[[A | B, Any, int], Results[U]] | functions.BaseJoinFunction[A | B, Any, U],
        **options: Unpack[OperatorOptions],
    ) -> DataStream[U]: ...
    def join(self, function: object, *args: object, **options: object) -> object:
        """Join two keyed streams: `execute(payload, key, tag)` returns the matches of a record as a list.

        Raises:
            GraphError: there are not two streams, or one has no keys.
        """
        if len(self._streams) != 2:
            raise GraphError(f"join: {len(self._streams)} streams are connected, but it takes exactly 2")
        for number, stream in enumerate(self._streams):
            _check_keyed(self._builder, f"join: input {number}", stream)
        common, kwargs = options_and_arguments(options)
        return self._join(Kind.JOIN, function_spec(Kind.JOIN, function, args, kwargs), common)

    def keyby(
        self, *functions: KeyFinder | Sequence[KeyFinder], strategy: Strategy = "hash", parallelism: int | None = None
    ) -> Self:
        """Give the records keys, by one function for all streams or by one for each."""
        first = functions[0] if len(functions) == 1 else functions
        each: tuple[object, ...] = tuple(first) if isinstance(first, list | tuple) else (first,)
        if len(each) not in (1, len(self._streams)):
            raise GraphError(f"keyby: {len(each)} functions for {len(self._streams)} streams")
        each = each if len(each) > 1 else each * len(self._streams)
        keyed = (
            stream._keyby(function, (), strategy, {"parallelism": parallelism})
            for stream, function in zip(self._streams, each, strict=True)
        )
        return type(self)(self._builder, tuple(keyed))

    key_by = keyby

    @overload
    def union(self: ConnectedStreams[A, B]) -> DataStream[A | B]: ...
    @overload
    def union(self) -> DataStream: ...
    def union(self) -> DataStream:
        """Return the connected streams as one."""
        return self._streams[0].union(*self._streams[1:])

    def map(self, function: object, *args: object, **options: object) -> DataStream:
        """Map the union of the streams; see `DataStream.map`."""
        return self.union()._apply(Kind.MAP, function, args, options)

    def sink(self, function: object, *args: object, **options: object) -> Self:
        """Hand the union of the streams to a sink; see `DataStream.sink`."""
        sink: Callable[..., object] = self.union().sink
        sink(function, *args, **options)
        return self

    def print(self, prefix: str = "", separator: str = " | ", colored: bool = True) -> Self:
        """Print every record of the union; see `DataStream.print`."""
        self.union().print(prefix, separator, colored)
        return self

    def _join(self, kind: Kind, spec: FunctionSpec, options: Mapping[str, object]) -> DataStream[object]:
        _check_states(self._builder, spec, self._streams)
        inputs = tuple(stream._id for stream in self._streams)
        keyed = all(isinstance(stream, KeyedStream) for stream in self._streams)
        id_ = self._streams[0]._then(kind, spec, options, inputs=inputs)
        return (KeyedStream if keyed else DataStream)(self._builder, id_)


def options_and_arguments(given: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Part keywords into those of every source and operator, and those that may be for the function's constructor."""
    options = {key: given[key] for key in SourceOptions.__annotations__ if key in given}
    return options, {key: value for key, value in given.items() if key not in options}


def _check_stream(builder: GraphBuilder, method: str, stream: object) -> None:
    if not isinstance(stream, DataStream):
        raise GraphError(f"{method}: {type(stream).__name__} is not a stream")
    if stream._builder is not builder:
        error = GraphError(f"{method}: the streams belong to two environments")
        raise hint(error, "Build both in the same environment.")


def _check_keyed(builder: GraphBuilder, label: str, stream: DataStream[object]) -> None:
    if not isinstance(stream, KeyedStream):
        error = GraphError(f'{label} ("{builder.node(stream._id).name}") has no keys')
        raise hint(error, "Call keyby(...) before it, on each of the streams.")


def _check_states(builder: GraphBuilder, spec: FunctionSpec | None, streams: Iterable[DataStream[object]]) -> None:
    """Refuse a function with states of keys if the records have no keys."""
    if spec is not None and spec.states:
        label = f"{spec.label}.{next(iter(spec.states))} is a state of each key, and the stream"
        for stream in streams:
            _check_keyed(builder, label, stream)


def _check_emit(method: str, emit: object) -> None:
    if emit not in ("each", "last"):
        raise hint(GraphError(f"{method}: emit is {emit!r}"), 'It is "each" or "last".')


def _with_retry(method: str, retry: object, on_error: object) -> object:
    """Return both as one `on_error`."""
    if retry is None:
        return on_error
    if not isinstance(retry, Retry):
        raise hint(GraphError(f"{method}: retry is {short(retry)}"), "Give Retry(...).")
    if on_error is not None and (isinstance(on_error, Retry) or retry.then != "fail"):
        error = GraphError(f"{method}: retry and on_error both say what follows the last attempt")
        raise hint(error, "Leave `then` out of the Retry, or give the Retry alone.")
    return retry if on_error is None else Retry(retry.attempts_max, retry.backoff_s, on_error)
