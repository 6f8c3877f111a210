"""A model folder as Hugging Face lays it out: config.json, weights, tokenizer files."""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file


def write_json(folder: pathlib.Path, name: str, value) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def write_weights(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path = folder / "model.safetensors"
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it comes readable by its owner only


def llama_config(**facts) -> dict:
    """config.json of a Llama without biases; `facts` are its sizes and what differs."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        **facts,
    }


def from_interleaved_rotary(weight: np.ndarray, head_count: int) -> np.ndarray:
    """Rows of a q or k projection from rotary pairs (0,1), (2,3), … to pairs (i, i + half).

    The first order is that of llama2.c and GGUF files, the second that of Hugging Face.
    """
    rows, columns = weight.shape
    head_size = rows // head_count
    pairs = weight.reshape(head_count, head_size // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def added_token(token_id: int, text: str) -> dict:
    """An entry of added_tokens in tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": True}


def tokenizer_json(added_tokens: list[dict], model: dict, **parts) -> dict:
    """tokenizer.json; `parts` are the normalizer, pre_tokenizer, post_processor and decoder."""
    stages = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        **{stage: parts[stage] for stage in stages},
        "model": model,
    }


def bpe(vocab: dict[str, int], merges: list[list[str]], **facts) -> dict:
    """A byte pair encoding model of tokenizer.json."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **facts,
        "vocab": vocab,
        "merges": merges,
    }


class Progress:
    """One line that counts up: rewritten on a terminal, every tenth step in a log."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0

    def step(self) -> None:
        self.done += 1
        last = self.done == self.total
        line = f"{self.what}: {self.done} of {self.total}"
        if sys.stderr.isatty():
            print("\r" + line, end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or self.done % max(1, self.total // 10) == 0:
            print(line, file=sys.stderr, flush=True)
