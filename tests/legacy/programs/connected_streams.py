# mypy: ignore-errors
"""Two streams become one by connect; a fast and a slow one."""

import time

from sage.core.api.connected_streams import ConnectedStreams
from sage.core.api.datastream import DataStream
from sage.kernel.api.local_environment import LocalEnvironment
from sage.runtime import LocalEnvironment as SameEnvironment

seen = []


def slow():
    for number in range(4):
        time.sleep(0.02)
        yield number


def main():
    assert SameEnvironment is LocalEnvironment
    env = LocalEnvironment("connected_streams")
    fast: DataStream = env.from_collection(range(100, 120))
    connected: ConnectedStreams = fast.connect(env.from_batch(slow).filter(lambda x: x != 2))
    connected.map(lambda x: x * 10).sink(seen.append)
    env.submit(autostop=True)
    return seen


if __name__ == "__main__":
    main()
