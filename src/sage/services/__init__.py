"""Services ready to be registered; each needs the extra that is named after it, when it is used."""

from sage._lazy import lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage._extras import MissingExtraError as MissingExtraError
    from sage.services._shared.measures import Measure as Measure
    from sage.services._shared.measures import MeasuredService as MeasuredService
    from sage.services.memory.memory import Memory as Memory
    from sage.services.memory.ranking import Weights as Weights
    from sage.services.memory.tables import Recollection as Recollection
    from sage.services.memory.tables import Turn as Turn
    from sage.services.models.embeddings import EmbeddingService as EmbeddingService
    from sage.services.models.embeddings import HashingEmbeddings as HashingEmbeddings
    from sage.services.models.endpoint import EndpointOptions as EndpointOptions
    from sage.services.models.llm import Answer as Answer
    from sage.services.models.llm import ExtractiveLLM as ExtractiveLLM
    from sage.services.models.llm import Image as Image
    from sage.services.models.llm import LLMService as LLMService
    from sage.services.models.llm import Message as Message
    from sage.services.models.llm import ToolCall as ToolCall
    from sage.services.models.minilm import MiniLMEmbeddings as MiniLMEmbeddings
    from sage.services.models.openai import OpenAIEmbeddings as OpenAIEmbeddings
    from sage.services.models.openai import OpenAILLM as OpenAILLM
    from sage.services.models.servers import serve_command as serve_command
    from sage.services.models.tools import Tool as Tool
    from sage.services.models.tools import called as called
    from sage.services.models.tools import tool_of as tool_of
    from sage.services.stores.graph import Edge as Edge
    from sage.services.stores.graph import GraphStore as GraphStore
    from sage.services.stores.graph import Node as Node
    from sage.services.stores.graph import Subgraph as Subgraph
    from sage.services.stores.key_value import KeyValueStore as KeyValueStore
    from sage.services.stores.key_value import SqliteKeyValue as SqliteKeyValue
    from sage.services.stores.redis import RedisKeyValue as RedisKeyValue
    from sage.services.vectors.chroma import ChromaStore as ChromaStore
    from sage.services.vectors.chroma import chroma_command as chroma_command
    from sage.services.vectors.contract import Entry as Entry
    from sage.services.vectors.contract import Hit as Hit
    from sage.services.vectors.contract import UnknownCollectionError as UnknownCollectionError
    from sage.services.vectors.contract import VectorStore as VectorStore
    from sage.services.vectors.milvus import MilvusStore as MilvusStore
    from sage.services.vectors.numpy import NumpyStore as NumpyStore
    from sage.services.vectors.rows import DuplicateIdError as DuplicateIdError
    from sage.services.vectors.sqlite import SqliteStore as SqliteStore

__getattr__ = lazy(
    __name__,
    globals(),
    {
        "._extras": "MissingExtraError",
        "_shared.measures": "Measure MeasuredService",
        "memory.memory": "Memory",
        "memory.ranking": "Weights",
        "memory.tables": "Recollection Turn",
        "models.embeddings": "EmbeddingService HashingEmbeddings",
        "models.endpoint": "EndpointOptions",
        "models.llm": "Answer ExtractiveLLM Image LLMService Message ToolCall",
        "models.minilm": "MiniLMEmbeddings",
        "models.openai": "OpenAIEmbeddings OpenAILLM",
        "models.servers": "serve_command",
        "models.tools": "Tool called tool_of",
        "stores.graph": "Edge GraphStore Node Subgraph",
        "stores.key_value": "KeyValueStore SqliteKeyValue",
        "stores.redis": "RedisKeyValue",
        "vectors.chroma": "ChromaStore chroma_command",
        "vectors.contract": "Entry Hit UnknownCollectionError VectorStore",
        "vectors.milvus": "MilvusStore",
        "vectors.numpy": "NumpyStore",
        "vectors.rows": "DuplicateIdError",
        "vectors.sqlite": "SqliteStore",
    },
)
