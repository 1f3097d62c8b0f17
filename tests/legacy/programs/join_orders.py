# mypy: ignore-errors
"""Joins users with their orders; neither stream comes of a class that is named like a source."""

from sage.common.core.functions.join_function import BaseJoinFunction
from sage.common.core.functions.keyby_function import KeyByFunction
from sage.common.core.functions.sink_function import SinkFunction
from sage.core.api.function.batch_function import BatchFunction
from sage.core.api.local_environment import LocalEnvironment

USERS = [{"id": 0, "name": "ann"}, {"id": 1, "name": "bob"}]
ORDERS = [{"user": 1, "what": "tea"}, {"user": 0, "what": "ink"}, {"user": 1, "what": "jam"}, {"user": 9, "what": "?"}]

joined = []


class Table(BatchFunction):
    def __init__(self, rows):
        self.rows = iter(rows)

    def execute(self):
        return next(self.rows, None)


class UserId(KeyByFunction):
    def execute(self, data):
        return data["id"]


class Buyer(KeyByFunction):
    def execute(self, data):
        return data["user"]


class UserOrders(BaseJoinFunction):
    def __init__(self):
        super().__init__()
        self.users = {}
        self.waiting = {}

    def execute(self, payload, key, tag):
        if tag == 0:
            self.users[key] = payload["name"]
            return [(payload["name"], what) for what in self.waiting.pop(key, [])]
        if key not in self.users:
            self.waiting.setdefault(key, []).append(payload["what"])
            return []
        return [(self.users[key], payload["what"])]


class Collect(SinkFunction):
    def execute(self, data):
        joined.append(data)


def main():
    env = LocalEnvironment("join_orders")
    users = env.from_batch(Table, USERS).keyby(UserId)
    orders = env.from_batch(Table, ORDERS).keyby(Buyer)
    users.connect(orders).join(UserOrders, parallelism=2).sink(Collect)
    env.submit(autostop=True)
    return joined


if __name__ == "__main__":
    main()
