"""Streams: what a pipeline is written with. Each method adds one node to the graph; nothing runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sage._arguments import check_count, check_seconds
from sage._plan.logical import FunctionSpec, GraphBuilder, Kind, Route
from sage._plan.signature import async_spec, comap_spec, function_spec, place_of
from sage.errors import GraphError, hint
from sage.failure import FAIL, POLICIES, ErrorPolicy, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

Strategy = Literal["hash", "broadcast", "round_robin"]

STRATEGIES = {"hash": Route.HASH, "broadcast": Route.BROADCAST, "round_robin": Route.ROUND_ROBIN}


def error_policy(builder: GraphBuilder, on_error: Any) -> ErrorPolicy:
    """Return what the user gave as `on_error` as the graph holds it.

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


class DataStream:
    """A stream of records. A stream used twice sends every record to both branches.

    Every method takes a function class with its constructor's arguments after it, an instance, or a callable (also a
    coroutine function), and by keyword:

        parallelism: how many tasks run the operator (default 1).
        name: the operator's name in reports, logs and errors.
        on_error: what follows when the function raises on a record: "fail" (the job; default), "skip" (the record),
            a `Retry`, or a stream of `Environment.dead_letters`.
    """

    def __init__(self, builder: GraphBuilder, id_: int) -> None:
        self._builder = builder
        self._id = id_

    def _then(
        self,
        kind: Kind,
        spec: FunctionSpec | None,
        *,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        route: Route | None = None,
        inputs: tuple[int, ...] | None = None,
        **settings: Any,
    ) -> int:
        return self._builder.add(
            kind,
            name=name,
            inputs=inputs or (self._id,),
            function=spec,
            parallelism=1 if parallelism is None else parallelism,
            on_error=error_policy(self._builder, on_error),
            route=route,
            settings=settings,
        )

    def map(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Replace each record by what `function` returns for it.

        A plain callable's None is data; a `MapFunction` that returns None drops the record. The key is kept.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.map(lambda x: x * 10))
        [10, 20, 30]
        """
        spec = function_spec(Kind.MAP, function, args, kwargs)
        return self._stream(self._then(Kind.MAP, spec, parallelism=parallelism, name=name, on_error=on_error))

    def map_async(
        self,
        function: Any,
        *args: Any,
        concurrency: int = 16,
        ordered: bool = True,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Replace each record by what the coroutine function `function` returns for it, many records at a time.

        The coroutines run on the event loop of the job. What they await runs meanwhile; what blocks, blocks all of
        them. A result goes on as soon as it is there, or with `ordered` when those of all records before it are. When
        a job is cancelled or fails, the coroutines that run are cancelled and awaited before `close()` of the function.

        Args:
            function: a coroutine function, a class or instance with `async def execute`, or a method of a service. A
                `MapFunction` that returns None drops the record, and `self.ctx.get_key()` tells a coroutine the key of
                its own record.
            *args: arguments of a function class.
            concurrency: how many records each task has in the function at a time, those included that wait for their
                next attempt. No more results wait to go on, so that a slow record holds up at most as many.
            ordered: whether results keep the order of their records.
            timeout_s: how long each attempt may take, in seconds; it fails with `TimeoutError` then.
            retry: how often a record is tried, with which pauses; `on_error` says what follows the last attempt.
            parallelism: see the class.
            name: see the class.
            on_error: see the class.
            **kwargs: keyword arguments of a function class.

        Raises:
            GraphError: `function` is no coroutine function, or a number cannot work.

        >>> from sage.testing import run
        >>> async def double(x): return x * 2
        >>> run([1, 2, 3], lambda stream: stream.map_async(double, concurrency=2))
        [2, 4, 6]
        """
        check_count("map_async: concurrency is", concurrency)
        if timeout_s is not None:
            check_seconds("map_async: timeout_s is", timeout_s, may_be_zero=False)
        spec = async_spec(function, args, kwargs)
        id_ = self._then(
            Kind.MAP_ASYNC,
            spec,
            parallelism=parallelism,
            name=name,
            on_error=_with_retry("map_async", retry, on_error),
            concurrency=concurrency,
            ordered=ordered,
            timeout_s=timeout_s,
        )
        return self._stream(id_)

    def map_batches(
        self,
        function: Any,
        *args: Any,
        max_records: int = 64,
        max_wait_s: float = 0.0,
        batch_format: Literal["list", "numpy"] = "list",
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Replace records by what `function` returns for a batch of them: one result for each, in their order.

        Keys are kept. When the function raises, or returns another number of results, the batch as a whole has failed:
        `on_error` concerns every record of it. `Retry` calls the function again with the same batch, "skip" drops all
        of its records, and each of them becomes a dead letter of its own. An exception in the place of a result, as
        `asyncio.gather(..., return_exceptions=True)` has them, is the failure of that record alone: the others go on,
        once `Retry`, which knows whole batches only, has called the function with all of them again.

        Args:
            function: takes a list or an array of 1 to `max_records` records, and returns a list, a tuple or an array.
            *args: arguments of a function class.
            max_records: how many records a batch has at most.
            max_wait_s: how long a record may wait for the batch to fill, in seconds; 0 takes what is there. The end of
                the stream ends the waiting.
            batch_format: "list", or "numpy" for `numpy.asarray` of the records; numpy has to be installed then.
            parallelism: see the class.
            name: see the class.
            on_error: see the class.
            **kwargs: keyword arguments of a function class.

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
        spec = function_spec(Kind.MAP_BATCHES, function, args, kwargs)
        id_ = self._then(
            Kind.MAP_BATCHES,
            spec,
            parallelism=parallelism,
            name=name,
            on_error=on_error,
            max_records=max_records,
            max_wait_s=max_wait_s,
            batch_format=batch_format,
        )
        return self._stream(id_)

    def filter(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Keep the records for which `function` returns something true.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.filter(lambda x: x > 1))
        [2, 3]
        """
        spec = function_spec(Kind.FILTER, function, args, kwargs)
        return self._stream(self._then(Kind.FILTER, spec, parallelism=parallelism, name=name, on_error=on_error))

    def flatmap(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Replace each record by what was given to `self.collect`, then what `function` returns or yields, in order.

        A generator is read as far as there is room downstream, so it may be long or endless.

        >>> from sage.testing import run
        >>> run(["a b", "c"], lambda stream: stream.flatmap(str.split))
        ['a', 'b', 'c']
        """
        spec = function_spec(Kind.FLATMAP, function, args, kwargs)
        return self._stream(self._then(Kind.FLATMAP, spec, parallelism=parallelism, name=name, on_error=on_error))

    flat_map = flatmap

    def process(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Run a `ProcessFunction`: a flat map that may also emit when its input has ended, by `finish()`.

        >>> from sage.testing import run
        >>> run([1, 2], lambda stream: stream.process(lambda x: [x, -x]))
        [1, -1, 2, -2]
        """
        spec = function_spec(Kind.PROCESS, function, args, kwargs)
        return self._stream(self._then(Kind.PROCESS, spec, parallelism=parallelism, name=name, on_error=on_error))

    def sink(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        at: Literal["cluster", "driver"] | None = None,
        **kwargs: Any,
    ) -> DataStream:
        """Hand each record to `function` and return this stream, so that chaining goes on from before the sink.

        `close()` of a `SinkFunction` is called once after the last record, whatever ends the job. On a cluster, a
        method of a list, a set, a dict, a deque or a queue, such as `results.append`, is called in the driver, where
        the program can see what comes of it; so is any other function with `at="driver"`.

        >>> from sage.testing import run
        >>> seen = []
        >>> run([1, 2], lambda stream: stream.sink(seen.append)) == seen
        True
        """
        spec = function_spec(Kind.SINK, function, args, kwargs)
        id_ = self._then(Kind.SINK, spec, parallelism=parallelism, name=name, on_error=on_error)
        if at is not None:
            self._builder.set(id_, place=place_of(at))
        return self

    def print(self, prefix: str = "", separator: str = " | ", colored: bool = True) -> DataStream:
        """Print every record and return this stream.

        Args:
            prefix: what stands before each record.
            separator: what stands between prefix and record.
            colored: whether the prefix is dimmed on a terminal.
        """
        id_ = self._then(Kind.SINK, FunctionSpec(_printer(prefix, separator, colored)), name=None)
        self._builder.set(id_, place=place_of("driver"))
        return self

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

    def keyby(
        self,
        function: Any,
        *args: Any,
        strategy: Strategy = "hash",
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> KeyedStream:
        """Give each record the key that `function` finds in it.

        Args:
            function: finds the key. The same key goes to the same task in every process and on every run; 0, "", False
                and None are keys like others. Keys that are equal in Python, such as 1 and 1.0, are one key.
            *args: arguments of a function class; a strategy may stand first, as in older programs.
            strategy: "hash" by key, "broadcast" to every task, "round_robin".
            parallelism: see the class.
            name: see the class.
            on_error: see the class.
            **kwargs: keyword arguments of a function class.

        >>> from sage.testing import run
        >>> run([1, 2, 3], lambda stream: stream.keyby(lambda x: x % 2).reduce(lambda a, b: a + b))
        [1, 2, 4]
        """
        if args and args[0] in STRATEGIES:
            strategy, args = args[0], args[1:]
        if strategy not in STRATEGIES:
            error = GraphError(f"keyby: strategy is {strategy!r}")
            raise hint(error, f"It is one of {', '.join(STRATEGIES)}.")
        spec = function_spec(Kind.KEYBY, function, args, kwargs)
        route = STRATEGIES[strategy]
        id_ = self._then(Kind.KEYBY, spec, parallelism=parallelism, name=name, on_error=on_error, route=route)
        return KeyedStream(self._builder, id_)

    key_by = keyby

    def reduce(
        self,
        function: Callable[[Any, Any], Any],
        *,
        emit: Literal["each", "last"] = "each",
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
    ) -> KeyedStream:
        """Combine the records of each key: `function(so_far, record)`, starting with the key's first record.

        The stream has to be keyed.

        Args:
            function: takes what was combined so far and the next record.
            emit: "each" emits the combined value after every record, "last" once for each key at the end.
            parallelism: see the class.
            name: see the class.
            on_error: see the class.

        Raises:
            GraphError: the stream has no keys, or `emit` is neither.

        >>> from sage.testing import run
        >>> run("abab", lambda stream: stream.keyby(lambda x: x).reduce(lambda a, b: a + b, emit="last"))
        ['aa', 'bb']
        """
        if emit not in ("each", "last"):
            raise hint(GraphError(f"reduce: emit is {emit!r}"), 'It is "each" or "last".')
        _check_keyed(self._builder, "reduce: the stream", self)
        spec = function_spec(Kind.REDUCE, function, (), {})
        id_ = self._then(
            Kind.REDUCE, spec, parallelism=parallelism, name=name, on_error=on_error, emit_each=emit == "each"
        )
        return KeyedStream(self._builder, id_)

    def broadcast(self) -> DataStream:
        """Send every record to all parallel tasks of the next operator."""
        return self._stream(self._then(Kind.UNION, None, name=None, route=Route.BROADCAST))

    def rebalance(self) -> DataStream:
        """Spread the records evenly over the parallel tasks of the next operator, whatever their keys."""
        return self._stream(self._then(Kind.UNION, None, name=None, route=Route.ROUND_ROBIN))

    def union(self, *others: DataStream) -> DataStream:
        """Return one stream of the records of this one and of the others; each keeps its own order."""
        for other in others:
            _check_stream(self._builder, "union", other)
        keyed = all(isinstance(stream, KeyedStream) for stream in (self, *others))
        id_ = self._then(Kind.UNION, None, inputs=(self._id, *(other._id for other in others)))
        return (KeyedStream if keyed else DataStream)(self._builder, id_)

    def connect(self, other: DataStream | ConnectedStreams) -> ConnectedStreams:
        """Return this stream and another as the inputs of one operator."""
        return ConnectedStreams(self._builder, (self,)).connect(other)

    def fill_future(self, future: DataStream) -> None:
        """Lead this stream back into `future`, a stream of `Environment.from_future`.

        Raises:
            GraphError: it is no future, or was filled before.
        """
        _check_stream(self._builder, "fill_future", future)
        self._builder.fill(self._id, future._id)

    def name(self, name: str) -> DataStream:
        """Give the operator behind this stream a name and return the stream.

        Raises:
            DuplicateNameError: another operator has it.
        """
        self._builder.rename(self._id, name)
        return self

    def _stream(self, id_: int) -> DataStream:
        """Return the stream of a new node; it is keyed where this one is."""
        return type(self)(self._builder, id_)


class KeyedStream(DataStream):
    """A stream whose records have keys; `self.ctx.get_key()` in a function class tells that of the record in hand."""


class ConnectedStreams:
    """Two or more streams as the inputs of one operator, which ends when all of them have ended."""

    def __init__(self, builder: GraphBuilder, streams: tuple[DataStream, ...]) -> None:
        self._builder = builder
        self._streams = streams

    def connect(self, other: DataStream | ConnectedStreams) -> ConnectedStreams:
        """Return these streams and another."""
        more = other._streams if isinstance(other, ConnectedStreams) else (other,)
        for stream in more:
            _check_stream(self._builder, "connect", stream)
        return ConnectedStreams(self._builder, (*self._streams, *more))

    def comap(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Map each input by a method of its own: `map0`, `map1`, ..., or by one callable for each input."""
        spec = comap_spec(function, args, kwargs, len(self._streams))
        return self._join(Kind.COMAP, spec, parallelism, name, on_error)

    def join(
        self,
        function: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Join two keyed streams: `execute(payload, key, tag)` returns the matches of a record as a list.

        Raises:
            GraphError: there are not two streams, or one has no keys.
        """
        if len(self._streams) != 2:
            raise GraphError(f"join: {len(self._streams)} streams are connected, but it takes exactly 2")
        for number, stream in enumerate(self._streams):
            _check_keyed(self._builder, f"join: input {number}", stream)
        spec = function_spec(Kind.JOIN, function, args, kwargs)
        return self._join(Kind.JOIN, spec, parallelism, name, on_error)

    def keyby(self, *functions: Any, strategy: Strategy = "hash", parallelism: int | None = None) -> ConnectedStreams:
        """Give the records keys, by one function for all streams or by one for each."""
        if len(functions) == 1 and isinstance(functions[0], list | tuple):
            functions = tuple(functions[0])
        if len(functions) not in (1, len(self._streams)):
            raise GraphError(f"keyby: {len(functions)} functions for {len(self._streams)} streams")
        each = functions if len(functions) > 1 else functions * len(self._streams)
        keyed = (
            stream.keyby(function, strategy=strategy, parallelism=parallelism)
            for stream, function in zip(self._streams, each, strict=True)
        )
        return ConnectedStreams(self._builder, tuple(keyed))

    key_by = keyby

    def union(self) -> DataStream:
        """Return the connected streams as one."""
        return self._streams[0].union(*self._streams[1:])

    def map(self, function: Any, *args: Any, **kwargs: Any) -> DataStream:
        """Map the union of the streams; see `DataStream.map`."""
        return self.union().map(function, *args, **kwargs)

    def sink(self, function: Any, *args: Any, **kwargs: Any) -> ConnectedStreams:
        """Hand the union of the streams to a sink; see `DataStream.sink`."""
        self.union().sink(function, *args, **kwargs)
        return self

    def print(self, prefix: str = "", separator: str = " | ", colored: bool = True) -> ConnectedStreams:
        """Print every record of the union; see `DataStream.print`."""
        self.union().print(prefix, separator, colored)
        return self

    def _join(
        self, kind: Kind, spec: FunctionSpec, parallelism: int | None, name: str | None, on_error: Any
    ) -> DataStream:
        inputs = tuple(stream._id for stream in self._streams)
        keyed = all(isinstance(stream, KeyedStream) for stream in self._streams)
        id_ = self._streams[0]._then(kind, spec, parallelism=parallelism, name=name, on_error=on_error, inputs=inputs)
        return (KeyedStream if keyed else DataStream)(self._builder, id_)


def _check_stream(builder: GraphBuilder, method: str, stream: object) -> None:
    if not isinstance(stream, DataStream):
        raise GraphError(f"{method}: {type(stream).__name__} is no stream")
    if stream._builder is not builder:
        error = GraphError(f"{method}: the streams belong to two environments")
        raise hint(error, "Build both in the same environment.")


def _check_keyed(builder: GraphBuilder, label: str, stream: DataStream) -> None:
    if not isinstance(stream, KeyedStream):
        error = GraphError(f'{label} ("{builder.node(stream._id).name}") has no keys')
        raise hint(error, "Call keyby(...) before it, on each of the streams.")


def _with_retry(method: str, retry: Retry | None, on_error: Any) -> Any:
    """Return both as one `on_error`."""
    if retry is None:
        return on_error
    if on_error is not None and (isinstance(on_error, Retry) or retry.then != "fail"):
        error = GraphError(f"{method}: retry and on_error both say what follows the last attempt")
        raise hint(error, "Leave `then` out of the Retry, or give the Retry alone.")
    return retry if on_error is None else Retry(retry.attempts_max, retry.backoff_s, on_error)


def _printer(prefix: str, separator: str, colored: bool) -> Callable[[Any], None]:
    import sys

    def show(record: Any) -> None:
        if not prefix:
            print(record)
        elif colored and sys.stdout.isatty():
            print(f"\x1b[2m{prefix}{separator}\x1b[0m{record}")
        else:
            print(f"{prefix}{separator}{record}")

    show.__name__ = "print"
    return show
