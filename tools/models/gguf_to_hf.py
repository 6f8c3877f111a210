#!/usr/bin/env python3
"""Turns the GGUF file of a Llama with a GPT-2 style vocabulary into a Hugging Face folder (fp16).

Weights are dequantized and rounded to fp16. tokenizer.json is built from the vocabulary and merges
in the file; its pre-tokenizer is chosen by the name that the file gives ("smollm").
"""

import argparse
import pathlib
import sys

import gguf
import numpy as np
from gguf.quants import dequantize

from hf_folder import (Progress, added_token, bpe, from_interleaved_rotary, llama_config,
                       tokenizer_json, write_json, write_weights)

CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type

# GGUF's name of a tensor in a layer → Hugging Face's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    # Single digits, then GPT-2's words.
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True},
        ],
    },
}


class Facts:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader):
        self.reader = reader
        self.architecture = self.get("general.architecture")

    def get(self, key: str, default=None):
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def of_model(self, key: str, default=None):
        return self.get(f"{self.architecture}.{key}", default)


def hf_name(name: str) -> str:
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    block, layer, tensor, weight = name.split(".")
    if block != "blk" or weight != "weight" or tensor not in LAYER_TENSORS:
        raise ValueError(f"tensor {name} belongs to no Llama that this program knows")
    return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.weight"


def read_weights(reader: gguf.GGUFReader, facts: Facts) -> dict[str, np.ndarray]:
    heads = {
        ".q_proj.weight": facts.of_model("attention.head_count"),
        ".k_proj.weight": facts.of_model("attention.head_count_kv"),
    }
    progress = Progress("tensors dequantized", len(reader.tensors))
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        for suffix, head_count in heads.items():
            if name.endswith(suffix):
                weight = from_interleaved_rotary(weight, head_count)
        tensors[name] = weight.astype(np.float16)
        progress.step()
    return tensors


def model_config(facts: Facts, tied: bool) -> dict:
    heads = facts.of_model("attention.head_count")
    hidden = facts.of_model("embedding_length")
    # The file holds this as fp32; its shortest decimal form is the number that was meant.
    epsilon = float(str(np.float32(facts.of_model("attention.layer_norm_rms_epsilon"))))
    return llama_config(
        bos_token_id=facts.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=facts.get("tokenizer.ggml.eos_token_id"),
        head_dim=facts.of_model("rope.dimension_count", hidden // heads),
        hidden_size=hidden,
        intermediate_size=facts.of_model("feed_forward_length"),
        max_position_embeddings=facts.of_model("context_length"),
        num_attention_heads=heads,
        num_hidden_layers=facts.of_model("block_count"),
        num_key_value_heads=facts.of_model("attention.head_count_kv", heads),
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
        rms_norm_eps=epsilon,
        rope_theta=facts.of_model("rope.freq_base", 10000.0),
        tie_word_embeddings=tied,
        torch_dtype="float16",
        vocab_size=len(facts.get("tokenizer.ggml.tokens")),
    )


def tokenizer_files(facts: Facts) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json."""
    kind, style = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or style not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"vocabulary {kind}/{style} is not supported; gpt2 with {known} is")
    tokens = facts.get("tokenizer.ggml.tokens")
    types = facts.get("tokenizer.ggml.token_type")
    controls = [i for i, token_type in enumerate(types) if token_type == CONTROL_TOKEN]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in facts.get("tokenizer.ggml.merges")]
    tokenizer = tokenizer_json(
        [added_token(i, tokens[i]) for i in controls],
        bpe(vocab, merges),
        normalizer=None,
        pre_tokenizer=PRE_TOKENIZERS[style],
        post_processor=None,
        decoder={**BYTE_LEVEL, "add_prefix_space": True},
    )

    def named(role: str):
        token_id = facts.get(f"tokenizer.ggml.{role}_token_id")
        return None if token_id is None else tokens[token_id]

    decoder = {str(i): added_token(i, tokens[i]) for i in controls}
    for entry in decoder.values():
        del entry["id"]
    config = {
        "added_tokens_decoder": decoder,
        "bos_token": named("bos"),
        "chat_template": facts.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": named("eos"),
        "model_max_length": facts.of_model("context_length"),
        "pad_token": named("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": named("unknown"),
    }
    return tokenizer, config


def convert(source: pathlib.Path, folder: pathlib.Path) -> None:
    reader = gguf.GGUFReader(source)
    facts = Facts(reader)
    if facts.architecture != "llama":
        raise ValueError(f"architecture {facts.architecture} is not supported; llama is")
    tokenizer, tokenizer_config = tokenizer_files(facts)
    weights = read_weights(reader, facts)
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(facts, tied="lm_head.weight" not in weights)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder, "config.json", config)
    write_json(folder, "generation_config.json", ends)
    write_json(folder, "tokenizer.json", tokenizer)
    write_json(folder, "tokenizer_config.json", tokenizer_config)
    print(f"writing {folder}", file=sys.stderr, flush=True)
    write_weights(folder, weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=pathlib.Path, help="the file to convert")
    parser.add_argument("folder", type=pathlib.Path, help="where the Hugging Face folder goes")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.folder)
    except (OSError, ValueError) as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
