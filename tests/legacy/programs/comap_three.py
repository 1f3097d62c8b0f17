# mypy: ignore-errors
"""Three kinds of events are put into one form."""

from sage.kernel.api.function.comap_function import BaseCoMapFunction
from sage.kernel.api.function.sink_function import SinkFunction
from sage.kernel.api.local_environment import LocalEnvironment

results = []


class Unify(BaseCoMapFunction):
    def map0(self, data):
        return {"kind": "login", "user": data}

    def map1(self, data):
        return {"kind": "order", "user": data["buyer"]}

    def map2(self, data):
        return {"kind": "logout", "user": data[0]}


class Collect(SinkFunction):
    def execute(self, data):
        results.append((data["kind"], data["user"]))


def main():
    env = LocalEnvironment("comap_three")
    logins = env.from_batch(["ann", "bob", "cid"])
    orders = env.from_batch([{"buyer": "ann"}, {"buyer": "ann"}])
    logouts = env.from_batch([("bob", 7)])
    logins.connect(orders).connect(logouts).comap(Unify).sink(Collect)
    env.submit(autostop=True)
    return results


if __name__ == "__main__":
    main()
