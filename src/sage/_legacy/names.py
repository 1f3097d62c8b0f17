"""The targets of old import paths: one table of names for all modules, and one of the words in module names.

The same name moved between modules several times in 2025, so a module of an old path has every name of the table.
"""

from __future__ import annotations

from collections.abc import Callable

from sage._legacy import environment, functions, jobs, loggers, metronome, operators, pipeline_service
from sage._runtime.dispatcher import Dispatcher
from sage.functions import StopSignal
from sage.serving import PipelineBridge, PipelineRequest, PipelineService

OFFERED: tuple[Callable[..., object], ...] = (
    *functions.KINDS.values(),
    functions.BaseFunction,
    functions.BaseService,
    functions.wrap_lambda,
    StopSignal,
    environment.LocalEnvironment,
    environment.RemoteEnvironment,
    environment.FlowNetEnvironment,
    jobs.JobManager,
    jobs.JobManagerClient,
    Dispatcher,
    loggers.CustomLogger,
    loggers.get_logger,
    metronome.Metronome,
    metronome.create_metronome,
    metronome.get_global_metronome,
    PipelineBridge,
    PipelineService,
    pipeline_service.PipelineServiceSource,
    pipeline_service.PipelineServiceSink,
    operators.load_config,
    operators.get_sage_paths,
    operators.FileSource,
    operators.JSONLBatch,
    operators.TerminalSink,
    operators.PrintSink,
    operators.FileSink,
    operators.QAPromptor,
    operators.OpenAIGenerator,
    operators.CharacterSplitter,
    operators.TextLoader,
)

NAMES: dict[str, Callable[..., object]] = {value.__name__: value for value in OFFERED} | {
    "BaseEnvironment": environment.OldManners,
    "DataStream": environment.OldStream,
    "ConnectedStreams": environment.OldConnectedStreams,
    "PipelineRequest": PipelineRequest,
}

EQUIVALENTS = {
    "ChromaRetriever": "sage.services.ChromaStore with sage.rag.Retrieve",
    "MilvusDenseRetriever": "sage.services.MilvusStore with sage.rag.Retrieve",
    "Wiki18FAISSRetriever": "a vector store of sage.services with sage.rag.Retrieve",
    "DenseRetriever": "a vector store of sage.services with sage.rag.Retrieve",
    "BM25sRetriever": "sage.rag.KeywordIndex with sage.rag.Retrieve",
    "BGEReranker": "a function of your own in map_batches after Retrieve",
    "HFGenerator": "sage.services.OpenAILLM and a server of your model by env.register_command",
    "VLLMGenerator": "sage.services.OpenAILLM and a server of your model by env.register_command",
    "UnifiedInferenceClient": "sage.services.OpenAILLM",
    "IntelligentLLMClient": "sage.services.OpenAILLM",
    "OpenAIClient": "sage.services.OpenAILLM",
    "EmbeddingFactory": "sage.services.HashingEmbeddings, MiniLMEmbeddings and OpenAIEmbeddings",
    "EmbeddingService": "sage.services.HashingEmbeddings, MiniLMEmbeddings and OpenAIEmbeddings",
    "apply_embedding_model": "sage.services.HashingEmbeddings, MiniLMEmbeddings and OpenAIEmbeddings",
    "MemoryManager": "sage.services.Memory",
    "MemoryService": "sage.services.Memory",
    "NeuroMemVDBService": "sage.services.Memory",
    "ShortTermMemoryService": "sage.services.Memory",
    "KVService": "sage.services.SqliteKeyValue or RedisKeyValue",
    "VDBService": "a vector store of sage.services",
    "GraphService": "sage.services.GraphStore",
    "MemoryWriter": "sage.services.Memory in a map",
    "SagePorts": "env.register_command, whose {port} is a free port",
    "KafkaSource": "sage.connectors.KafkaTopic",
    "KafkaSourceFunction": "sage.connectors.KafkaTopic",
    "HFDatasetBatch": "env.from_batch with an iterator over the data set",
    "MemWriteSink": "sink(results.append)",
    "BaseScheduler": "nothing: Ray places tasks, and .place(...) says what an operator needs",
    "FIFOScheduler": "nothing: Ray places tasks, and .place(...) says what an operator needs",
    "LoadAwareScheduler": "nothing: Ray places tasks, and .place(...) says what an operator needs",
    "MCPServer": "a function of your own around the package mcp",
    "BaseAgent": "sage.services.OpenAILLM with tools in a map",
}
"""Old names that are not offered, with the one to use instead."""

WORDS = frozenset(
    """
    agents api base_environment base_function base_service batch batch_function chunk clients comap_function
    common communication components config config_loader connected_streams context core custom_logger
    datastream dispatcher document_loaders embedding embedding_methods environment evaluate file
    filter_function flatmap_function flownet_environment foundation function functions future_function
    generator inference interfaces io io_utils job_manager jobmanager jobmanager_client join_function kernel
    kernels keyby_function lambda_function lib libs loader local_environment logging longrefiner map_function
    memory metronome middleware network operator operators output_paths packet pipeline_bridge
    pipeline_service pipeline_sink pipeline_source platform plugins ports profiler promptor rag refiner
    remote_environment reranker retriever router runtime scheduler serialization service service_factory
    services sink sink_function source source_function splitter stream task unlearning utils vector_stores
    writer
    """.split()  # noqa: SIM905
)
"""The words that the paths of those modules are made of."""


def is_old(path: str) -> bool:
    """Return whether `path`, such as "sage.core.api.function.map_function", is a module of an old program."""
    return WORDS.issuperset(path.split(".")[1:])


def missing(path: str, name: str) -> ImportError | AttributeError:
    """Return the error for a name that an old module does not have; it names the replacement."""
    if name not in EQUIVALENTS:
        return AttributeError(f"module {path!r} has no attribute {name!r}")
    error = ImportError(f"cannot import name {name!r} from {path!r}: use {EQUIVALENTS[name]}", name=name, path=path)
    error.add_note('The page "From upstream SAGE" of the documentation has a table of all names.')
    return error
