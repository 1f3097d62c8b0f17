"""Several streams as inputs of one operator: union, connect, comap and join."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from sage import BaseCoMapFunction, BaseJoinFunction, GraphError, LocalEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]


def arriving(env: LocalEnvironment, stream: DataStream) -> list[Any]:
    arrived: list[Any] = []
    stream.sink(arrived.append)
    env.submit(autostop=True)
    return arrived


class Three(BaseCoMapFunction):
    def __init__(self, mark: str = "") -> None:
        self._mark = mark

    def map0(self, data: int) -> str:
        return f"a{data}{self._mark}"

    def map1(self, data: int) -> str:
        return f"b{data}{self._mark}"

    def map2(self, data: int) -> str | None:
        return f"c{data}{self._mark}" if data != 1 else None


def test_union_keeps_the_order_of_each_stream(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    streams = [env.from_batch(range(start, start + 50)) for start in (0, 100, 200)]
    arrived = arriving(env, streams[0].union(streams[1], streams[2]))
    assert len(arrived) == 150
    for start in (0, 100, 200):
        assert [number for number in arrived if start <= number < start + 100] == list(range(start, start + 50))


def test_a_union_of_a_stream_with_itself_gives_each_record_twice(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch(range(20))
    assert sorted(arriving(env, stream.union(stream))) == sorted([*range(20), *range(20)])


def test_a_diamond_gives_all_of_both_ways(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch(range(300))
    even = stream.filter(lambda number: number % 2 == 0).map(lambda number: number)
    odd = stream.map(lambda number: number, parallelism=2).filter(lambda number: number % 2)
    assert sorted(arriving(env, even.union(odd))) == list(range(300))


def test_comap_of_two_inputs(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    arrived = arriving(env, env.from_batch(range(3)).connect(env.from_batch(range(2))).comap(Three, "!"))
    assert sorted(arrived) == ["a0!", "a1!", "a2!", "b0!", "b1!"]


def test_comap_of_three_inputs_drops_none(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    a, b, c = (env.from_batch(range(count)) for count in (1, 2, 3))
    assert sorted(arriving(env, a.connect(b).connect(c).comap(Three()))) == ["a0", "b0", "b1", "c0", "c2"]


def test_connected_streams_can_be_connected(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    a, b, c = (env.from_batch([count]) for count in range(3))
    assert sorted(arriving(env, a.connect(b.connect(c)).comap(Three))) == ["a0", "b1", "c2"]


def test_comap_of_callables_keeps_none(backend: Backends) -> None:
    async def third(number: int) -> str:
        return f"third {number}"

    env = LocalEnvironment("test", backend=backend)
    a, b, c = (env.from_batch([count]) for count in range(3))
    arrived = arriving(env, a.connect(b).connect(c).comap([lambda x: None, lambda x: -x, third]))
    assert sorted(map(repr, arrived)) == sorted(["None", "-1", "'third 2'"])


def test_the_inputs_of_a_comap_may_be_one_stream(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch(range(3))
    arrived = arriving(env, stream.connect(stream).comap(lambda x: x, lambda x: -x - 1))
    assert sorted(arrived) == [-3, -2, -1, 0, 1, 2]


def test_a_parallel_comap_sees_each_record_once(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    both = env.from_batch(range(40)).connect(env.from_batch(range(40)))
    arrived = arriving(env, both.comap(lambda x: ("a", x), lambda x: ("b", x), parallelism=3))
    assert sorted(arrived) == sorted((side, number) for side in "ab" for number in range(40))


def test_map_sink_and_print_of_connected_streams_see_the_union(
    backend: Backends, capsys: pytest.CaptureFixture[str]
) -> None:
    env = LocalEnvironment("test", backend=backend)
    seen: list[int] = []
    both = env.from_batch([1]).connect(env.from_batch([2])).sink(seen.append).print("both")
    assert sorted(arriving(env, both.map(lambda x: x * 10))) == [10, 20]
    assert sorted(seen) == [1, 2]
    assert sorted(capsys.readouterr().out.splitlines()) == ["both | 1", "both | 2"]


class Pairs(BaseJoinFunction):
    """Gives every pair of records of one key, the first stream's first."""

    def __init__(self) -> None:
        self._seen: tuple[dict[Any, list[Any]], ...] = (defaultdict(list), defaultdict(list))

    def execute(self, payload: Any, key: Any, tag: int) -> list[tuple[Any, Any, Any]]:
        assert self.ctx.get_key() == key
        self._seen[tag][key].append(payload)
        return [(key, *((payload, other) if tag == 0 else (other, payload))) for other in self._seen[1 - tag][key]]


@pytest.mark.parametrize("parallelism", [1, 3])
def test_join_gives_every_pair_of_one_key(backend: Backends, parallelism: int) -> None:
    env = LocalEnvironment("test", backend=backend)
    users = env.from_batch([{"id": number, "name": f"user{number}"} for number in range(5)])
    orders = env.from_batch([{"user": number % 7, "cup": number} for number in range(40)])
    joined = (
        users.keyby(lambda user: user["id"])
        .connect(orders.keyby(lambda order: order["user"]))
        .join(Pairs, parallelism=parallelism)
    )
    arrived = arriving(env, joined.map(lambda match: (match[0], match[1]["name"], match[2]["cup"])))
    assert sorted(arrived) == sorted(
        (number % 7, f"user{number % 7}", number) for number in range(40) if number % 7 < 5
    )


def test_keyby_of_connected_streams_takes_one_function_for_each(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    both = env.from_batch(["a1", "b2"]).connect(env.from_batch([(1, "one"), (2, "two"), (3, "three")]))
    joined = both.keyby(lambda text: int(text[1]), lambda pair: pair[0]).join(Pairs)
    assert sorted(arriving(env, joined)) == [(1, "a1", (1, "one")), (2, "b2", (2, "two"))]


def test_join_takes_a_callable(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    both = env.from_batch([1]).connect(env.from_batch([2])).keyby(lambda x: None)
    arrived = arriving(env, both.join(lambda payload, key, tag: [(payload, key, tag)]))
    assert sorted(arrived) == [(1, None, 0), (2, None, 1)]


def test_a_join_that_returns_nothing_gives_nothing(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    both = env.from_batch([1]).connect(env.from_batch([])).keyby(lambda x: x)
    assert arriving(env, both.join(lambda payload, key, tag: None)) == []


def test_a_join_without_keys_is_refused() -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match=r'join: input 1 \("right"\) has no keys') as caught:
        env.from_batch([1]).keyby(lambda x: x).connect(env.from_batch([2], name="right")).join(Pairs)
    assert "keyby" in caught.value.__notes__[0]


def test_a_join_of_three_streams_is_refused() -> None:
    env = LocalEnvironment("test")
    a, b, c = (env.from_batch([1]).keyby(lambda x: x) for _ in range(3))
    with pytest.raises(GraphError, match="join: 3 streams are connected, but it takes exactly 2"):
        a.connect(b).connect(c).join(Pairs)  # type: ignore[misc]


def test_a_comap_that_lacks_a_method_is_refused() -> None:
    class Two(BaseCoMapFunction):
        def map0(self, data: int) -> int:
            return data

        def map1(self, data: int) -> int:
            return data

    env = LocalEnvironment("test")
    a, b, c = (env.from_batch([1]) for _ in range(3))
    with pytest.raises(GraphError, match="Two has no map2") as caught:
        a.connect(b).connect(c).comap(Two)
    assert "map0 to map2" in caught.value.__notes__[0]
    with pytest.raises(GraphError, match="2 callables for 3 inputs"):
        a.connect(b).connect(c).comap(lambda x: x, lambda x: x)


def test_streams_of_two_environments_cannot_meet() -> None:
    one, two = LocalEnvironment("one"), LocalEnvironment("two")
    stream = one.from_batch([1])
    for meet in (stream.union, stream.connect):
        with pytest.raises(GraphError, match="the streams belong to two environments"):
            meet(two.from_batch([2]))
    with pytest.raises(GraphError, match="union: list is not a stream"):
        stream.union([1, 2])  # type: ignore[arg-type]
