"""Sources and sinks for files, databases and brokers, written as your own would be."""

from sage._lazy import lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage.connectors.csv import Csv as Csv
    from sage.connectors.csv import CsvFiles as CsvFiles
    from sage.connectors.http import HttpSink as HttpSink
    from sage.connectors.json_lines import JsonLines as JsonLines
    from sage.connectors.json_lines import JsonLinesFiles as JsonLinesFiles
    from sage.connectors.kafka import KafkaRecord as KafkaRecord
    from sage.connectors.kafka import KafkaSink as KafkaSink
    from sage.connectors.kafka import KafkaTopic as KafkaTopic
    from sage.connectors.parquet import Parquet as Parquet
    from sage.connectors.parquet import ParquetFiles as ParquetFiles
    from sage.connectors.postgres import PostgresSink as PostgresSink
    from sage.connectors.postgres import PostgresTable as PostgresTable
    from sage.connectors.redis_streams import RedisEntry as RedisEntry
    from sage.connectors.redis_streams import RedisStream as RedisStream
    from sage.connectors.redis_streams import RedisStreamSink as RedisStreamSink
    from sage.connectors.sqlite import SqliteSink as SqliteSink
    from sage.connectors.sqlite import SqliteTable as SqliteTable
    from sage.connectors.text import Text as Text
    from sage.connectors.text import TextFiles as TextFiles
    from sage.connectors.webhook import Webhook as Webhook
    from sage.connectors.webhook import WebRequest as WebRequest

__getattr__ = lazy(
    __name__,
    globals(),
    {
        "csv": "Csv CsvFiles",
        "http": "HttpSink",
        "json_lines": "JsonLines JsonLinesFiles",
        "kafka": "KafkaRecord KafkaSink KafkaTopic",
        "parquet": "Parquet ParquetFiles",
        "postgres": "PostgresSink PostgresTable",
        "redis_streams": "RedisEntry RedisStream RedisStreamSink",
        "sqlite": "SqliteSink SqliteTable",
        "text": "Text TextFiles",
        "webhook": "WebRequest Webhook",
    },
)
