"""The program `llama-server` with a real llama.cpp in it, of the package xllamacpp, and a tiny model for it."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

WIDTH, LAYERS, HEADS, INNER, CONTEXT = 64, 2, 4, 128, 512


def write_model(path: Path, seed: int = 0) -> None:
    """Write a model that says nonsense, the same for a seed, as GGUF: half a megabyte."""
    import numpy as np
    from gguf import GGUFWriter, LlamaFileType, TokenType

    letters = [chr(code).encode() for code in range(33, 127)]
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), "▁".encode(), *letters]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        value = np.ones(shape) if "norm" in name else random.standard_normal(shape) * 0.1
        writer.add_tensor(f"{name}.weight", value.astype(np.float32))

    add("token_embd", len(tokens), WIDTH)
    add("output_norm", WIDTH)
    add("output", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve() -> None:
    """Serve a model until SIGTERM or SIGINT comes, with the words of llama.cpp's own program."""
    import xllamacpp

    parser = argparse.ArgumentParser("llama-server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--embeddings", action="store_true")
    given = parser.parse_args()
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # also in the server's threads, which begin now
    options = xllamacpp.CommonParams()
    options.model.path = given.model
    chosen = {
        "model_alias": {given.alias},
        "hostnames": [given.host],
        "port": given.port,
        "api_keys": [key for key in [os.environ.get("LLAMA_API_KEY")] if key],
        "n_parallel": 4,
        "n_ctx": 4 * CONTEXT,
    }
    if given.embeddings:
        chosen |= {"embedding": True, "pooling_type": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN}
    for name, value in chosen.items():
        setattr(options, name, value)
    setattr(options.cpuparams, "n_threads", 1)  # noqa: B010  (of a library without types, whose names nothing else has)
    server = xllamacpp.Server(options)
    Path(os.environ["NOTED"]).write_text(str(os.getpid()))
    signal.sigwait(ends)
    del server  # it ends its threads
    os.write(1, b"\nllama-server has ended\n")  # at once, as its log is written from other threads


if __name__ == "__main__":
    serve()
