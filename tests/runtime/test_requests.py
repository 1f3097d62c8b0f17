"""The source of a served pipeline reads exactly what has come."""

from __future__ import annotations

from sage.serving import PipelineBridge, RequestSource


def test_a_source_without_requests_is_idle_until_one_comes_or_the_end() -> None:
    bridge = PipelineBridge()
    source = RequestSource(bridge)
    assert source.is_idle
    assert source.read(10) == []
    for payload in "abc":
        bridge.submit(payload)
    assert not source.is_idle
    assert source.read(2) == ["a", "b"]
    assert not source.is_idle
    assert source.read(10) == ["c"]
    assert source.is_idle
    bridge.submit("d")
    bridge.close()
    assert not source.is_idle
    assert source.read(10) == ["d"]
    assert not source.is_idle
    assert source.read(10) is None
