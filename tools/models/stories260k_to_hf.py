#!/usr/bin/env python3
"""Turns a model in llama2.c's first format and its vocabulary into a Hugging Face folder (fp32).

The model file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
a negative vocab_size means that the output head has its own weights) and then fp32 tensors, each
kind for all layers together. The vocabulary file is an int32 (the longest piece) and then, per
token, a fp32 score, an int32 length and that many bytes.
"""

import argparse
import dataclasses
import pathlib
import struct
import sys

import numpy as np

from hf_folder import (added_token, bpe, from_interleaved_rotary, llama_config, tokenizer_json,
                       write_json, write_weights)

UNKNOWN, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # ids 3 … 258 are the bytes
FIRST_PIECE = FIRST_BYTE + 256
SPACE = "\u2581"


@dataclasses.dataclass
class Sizes:
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def read_weights(data: bytes) -> tuple[Sizes, dict[str, np.ndarray]]:
    sizes = Sizes(*struct.unpack_from("<7i", data))
    tied = sizes.vocab_size > 0
    sizes.vocab_size = abs(sizes.vocab_size)
    values = np.frombuffer(data, dtype="<f4", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        if position + count > values.size:
            raise ValueError("the model file ends early")
        tensor = values[position:position + count].reshape(shape)
        position += count
        return tensor

    dim, hidden, layers = sizes.dim, sizes.hidden_dim, sizes.n_layers
    kv_dim = sizes.head_dim * sizes.n_kv_heads
    embedding = take(sizes.vocab_size, dim)
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    take(2, sizes.seq_len, sizes.head_dim // 2)  # tables of cosines and sines
    if not tied:
        tensors["lm_head.weight"] = take(sizes.vocab_size, dim)
    heads = {"self_attn.q_proj": sizes.n_heads, "self_attn.k_proj": sizes.n_kv_heads}
    for name, stack in stacked.items():
        for layer, weight in enumerate(stack):
            if name in heads:
                weight = from_interleaved_rotary(weight, heads[name])
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    return sizes, tensors


def read_pieces(data: bytes, count: int) -> list[tuple[str, float]]:
    """The text and score of every token, white space as sentencepiece writes it."""
    pieces = []
    position = 4
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        text = data[position:position + length].decode("utf-8")
        position += length
        pieces.append((text.replace(" ", SPACE), score))
    for token_id, text in ((UNKNOWN, "<unk>"), (BOS, "<s>"), (EOS, "</s>")):
        pieces[token_id] = (text, 0.0)
    return pieces


def merges_of(pieces: list[tuple[str, float]]) -> list[list[str]]:
    """Every way to make a piece from two, the best-scored piece first.

    llama2.c joins, again and again, the two neighbours whose joint piece scores best. Ranks in
    this order do the same, since no two pieces share a score.
    """
    ids = {text: i for i, (text, _) in enumerate(pieces)}
    merges = []
    for text, score in pieces[FIRST_PIECE:]:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3] for merge in merges]


def tokenizer_files(pieces: list[tuple[str, float]], seq_len: int) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json."""
    names = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = template + [{"Sequence": {"id": "B", "type_id": 1}}]
    vocab = {text: i for i, (text, _) in enumerate(pieces)}
    tokenizer = tokenizer_json(
        [added_token(i, pieces[i][0]) for i in names.values()],
        bpe(vocab, merges_of(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        pre_tokenizer=None,
        post_processor={
            "type": "TemplateProcessing",
            "single": template,
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )
    config = {
        **{name: pieces[i][0] for name, i in names.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tokenizer, config


def convert(model: pathlib.Path, vocabulary: pathlib.Path, folder: pathlib.Path) -> None:
    sizes, tensors = read_weights(model.read_bytes())
    pieces = read_pieces(vocabulary.read_bytes(), sizes.vocab_size)
    tokenizer, tokenizer_config = tokenizer_files(pieces, sizes.seq_len)
    folder.mkdir(parents=True, exist_ok=True)
    # A story ends where the next would begin: with BOS.
    ends = {"bos_token_id": BOS, "eos_token_id": [BOS, EOS]}
    write_json(folder, "config.json", llama_config(
        **ends,
        head_dim=sizes.head_dim,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden_dim,
        max_position_embeddings=sizes.seq_len,
        num_attention_heads=sizes.n_heads,
        num_hidden_layers=sizes.n_layers,
        num_key_value_heads=sizes.n_kv_heads,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        tie_word_embeddings="lm_head.weight" not in tensors,
        torch_dtype="float32",
        vocab_size=sizes.vocab_size,
    ))
    write_json(folder, "generation_config.json", ends)
    write_json(folder, "tokenizer.json", tokenizer)
    write_json(folder, "tokenizer_config.json", tokenizer_config)
    write_weights(folder, tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="for example stories260K.bin")
    parser.add_argument("vocabulary", type=pathlib.Path, help="for example tok512.bin")
    parser.add_argument("folder", type=pathlib.Path, help="where the Hugging Face folder goes")
    arguments = parser.parse_args()
    try:
        convert(arguments.model, arguments.vocabulary, arguments.folder)
    except (OSError, ValueError, struct.error) as error:
        print(f"stories260k_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
