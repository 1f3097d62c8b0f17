"""An agent: a model plans, asks for tools, sees their results, and answers. It needs the server of such a model.

python examples/agent.py http://127.0.0.1:8000/v1 MODEL "How many ropes are there?" ...
"""

import sys
from typing import Any

from sage import LocalEnvironment, MapFunction
from sage.services import Message, OpenAILLM, called

STEPS_MAX = 8
SYSTEM = "You work in a shop. Look up facts with the tools, and answer in one sentence."
STOCK = {"rope": 12, "lamp": 0, "kettle": 3}


def stock(article: str) -> int:
    """Return how many pieces of an article are in stock."""
    return STOCK[article]


TOOLS = [stock]


class Agent(MapFunction):
    """Answers a question in steps: the model plans, the tools it asks for are called, and it sees their results."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def execute(self, data: str) -> str:
        turns = [Message("system", SYSTEM), Message("user", data)]
        for _ in range(STEPS_MAX):
            answer = self._llm.generate(turns, tools=TOOLS)
            turns.append(answer.turn)
            if not answer.tool_calls:
                return f"{data} {answer.text}"
            turns += [called(call, TOOLS) for call in answer.tool_calls]
        raise RuntimeError(f"no answer after {STEPS_MAX} steps")


url, model, *questions = sys.argv[1:]
env = LocalEnvironment("agent")
llm = env.register_service("llm", OpenAILLM, model, base_url=url)
env.from_batch(questions).map(Agent, llm, on_error="skip").print()
env.run()
