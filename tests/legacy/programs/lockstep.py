# mypy: ignore-errors
"""A source with a metronome sends a record when the one before it has left the pipeline."""

import threading

from sage.core.api.function.batch_function import BatchFunction
from sage.core.api.function.map_function import MapFunction
from sage.core.api.function.sink_function import SinkFunction
from sage.core.api.local_environment import LocalEnvironment
from sage.core.communication.metronome import create_metronome

metronome = create_metronome("sync_metronome")
lock = threading.Lock()
events = []


def note(event):
    with lock:
        events.append(event)


class SyncBatch(BatchFunction):
    use_metronome = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metronome = metronome
        self.counter = 0

    def execute(self):
        if self.counter == 4:
            return None
        self.counter += 1
        note(f"sent {self.counter}")
        return self.counter


class Double(MapFunction):
    def execute(self, data):
        return data * 2


class SyncSink(SinkFunction):
    use_metronome = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metronome = metronome

    def execute(self, data):
        note(f"done {data // 2}")


def main():
    metronome.release_once()
    env = LocalEnvironment("lockstep")
    # Three tasks on the way, so that the source could run ahead if nothing held it.
    env.from_batch(SyncBatch).map(Double, parallelism=2).sink(SyncSink)
    env.submit(autostop=True)
    return events


if __name__ == "__main__":
    main()
