#!/usr/bin/env python3
"""Computes reference outputs of an AWQ checkpoint with transformers, in fp32 on a CPU.

The checkpoint is an AutoAWQ gemm folder (--awq), or it is made here from an fp16 folder by
rounding to nearest (--rtn), which also writes the digests of its tensors. Prompts are those of
another goldens.json. Written to OUT: goldens.json, and for --rtn checkpoint.json.

Install tools/models/requirements-goldens.txt into a virtual environment first.
"""

import argparse
import hashlib
import json
import math
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from awq_gemm import dequantize, quantized_tensors

TOKENS = 64
TOP = 5
LINEAR_SUFFIXES = tuple(
    f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def checkpoint_from_fp16(folder: pathlib.Path, group_size: int) -> dict[str, np.ndarray]:
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(LINEAR_SUFFIXES):
            layer = name.removesuffix(".weight")
            tensors.update(quantized_tensors(layer, tensor, group_size))
        else:
            tensors[name] = tensor
    return tensors


def dense_weights(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qweight":
            weights[f"{layer}.weight"] = torch.from_numpy(dequantize(tensors, layer))
        elif kind not in ("qzeros", "scales"):
            weights[name] = torch.from_numpy(tensor.astype(np.float32))
    return weights


def load_model(folder: pathlib.Path, tensors: dict[str, np.ndarray]):
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.torch_dtype = torch.float32
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(dense_weights(tensors), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"tensors missing: {missing}, unexpected: {unexpected}")
    model.tie_weights()
    return model.eval()


def generate(model, prompt: list[int]) -> list[int]:
    """Greedy, with a KV cache; the end of sequence is not acted on."""
    generated = []
    cache = transformers.DynamicCache()
    ids = torch.tensor([prompt])
    for _ in range(TOKENS):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
        generated.append(int(logits.argmax()))
        ids = torch.tensor([[generated[-1]]])
    return generated


def teacher_forced(model, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Logits [64, vocab] at the places that generated tokens were taken from, without a cache."""
    ids = torch.tensor([prompt + generated])
    return model(ids, use_cache=False).logits[0, len(prompt) - 1:-1]


def step_of(logits: torch.Tensor) -> dict:
    logprobs = logits.double().log_softmax(-1)
    best = logprobs.topk(TOP)
    pairs = zip(best.indices.tolist(), best.values.tolist())
    two = logits.topk(2).values
    return {
        "top5": [[token, round(logprob, 6)] for token, logprob in pairs],
        "margin": round(float(two[0] - two[1]), 6),
    }


def golden_of(prompt: dict, model, exact_model, tokenizer, eos: int) -> dict:
    ids = prompt["prompt_token_ids"]
    text = prompt.get("rendered_prompt", prompt.get("prompt"))
    if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        raise ValueError(f"{prompt['name']}: the tokenizer gives other ids than the prompts file")
    generated = generate(model, ids)
    logits = teacher_forced(model, ids, generated)
    if logits.argmax(-1).tolist() != generated:
        raise ValueError(f"{prompt['name']}: a cache and one pass over all tokens disagree")
    exact = teacher_forced(exact_model, ids, generated)
    difference = (exact.log_softmax(-1) - logits.double().log_softmax(-1)).abs()
    steps = [step_of(row) for row in logits]
    margins = [step["margin"] for step in steps]
    end = generated.index(eos) if eos in generated else None
    kept = ("name", "kind", "prompt", "messages", "rendered_prompt", "prompt_token_ids")
    return {
        **{key: prompt[key] for key in kept if key in prompt},
        "prompt_token_count": len(ids),
        "generated_token_ids": generated,
        "first_eos_step": end,
        "generated_text": tokenizer.decode(generated),
        "generated_text_until_eos": tokenizer.decode(generated[:end]),
        "steps": steps,
        "min_margin": min(margins),
        "min_margin_step": margins.index(min(margins)),
        "fp64_greedy_agrees": exact.argmax(-1).tolist() == generated,
        "max_logprob_diff_fp32_fp64": float(f"{float(difference.max()):.3g}"),
    }


def perplexity(model, source: dict) -> dict:
    """Mean of -ln p over windows of the token ids in another perplexity.json."""
    window = source["window"]
    windows = torch.tensor(source["token_ids"]).reshape(-1, window)
    means = []
    for ids in windows:
        logprobs = model(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        means.append(float(-logprobs.gather(1, ids[1:, None]).mean()))
        print(f"perplexity: window {len(means)} of {len(windows)}", file=sys.stderr, flush=True)
    mean = sum(means) / len(means)
    return {
        "mean_nll": round(mean, 6),
        "perplexity": round(math.exp(mean), 5),
        "window_nll": [round(value, 6) for value in means],
    }


def write_goldens(path: pathlib.Path, head: dict, goldens: list[dict]) -> None:
    def line(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    parts = [f"{line(key)}:{line(value)}" for key, value in head.items()]
    rows = ",\n".join(line(golden) for golden in goldens)
    text = "{" + ",\n".join(parts) + ',\n"prompts":[\n' + rows + "]}\n"
    path.write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--awq", type=pathlib.Path, help="an AutoAWQ gemm folder")
    source.add_argument("--rtn", type=pathlib.Path, help="an fp16 folder, quantized here")
    parser.add_argument("--group-size", type=int, default=64, help="for --rtn (64)")
    parser.add_argument("--prompts", type=pathlib.Path, required=True, help="a goldens.json")
    parser.add_argument("--perplexity", type=pathlib.Path, help="a perplexity.json")
    parser.add_argument("out", type=pathlib.Path, help="the folder to write to")
    return parser.parse_args()


def digests(tensors: dict[str, np.ndarray], group_size: int) -> dict:
    ordered = sorted(tensors.items())
    return {
        "group_size": group_size,
        "sha256": {name: hashlib.sha256(t.tobytes()).hexdigest() for name, t in ordered},
    }


def main() -> int:
    arguments = parse_arguments()
    folder = arguments.rtn or arguments.awq
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.rtn:
        tensors = checkpoint_from_fp16(folder, arguments.group_size)
        described = json.dumps(digests(tensors, arguments.group_size), indent=0)
        (arguments.out / "checkpoint.json").write_text(described + "\n", encoding="utf-8")
    else:
        tensors = load_file(folder / "model.safetensors")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    eos = tokenizer.eos_token_id
    goldens = []
    with torch.no_grad():
        model = load_model(folder, tensors)
        exact_model = load_model(folder, tensors).double()
        for prompt in json.loads(arguments.prompts.read_text(encoding="utf-8"))["prompts"]:
            goldens.append(golden_of(prompt, model, exact_model, tokenizer, eos))
            print(f"prompt {prompt['name']} done", file=sys.stderr, flush=True)
        head = {"description": DESCRIPTION, "eos_token_id": eos, "bos_added": False}
        if arguments.perplexity:
            source = json.loads(arguments.perplexity.read_text(encoding="utf-8"))
            head["perplexity"] = perplexity(model, source)
    write_goldens(arguments.out / "goldens.json", head, goldens)
    return 0


DESCRIPTION = (
    f"Greedy continuations by transformers in fp32: argmax, no penalties, the end of sequence not "
    f"acted on, always {TOKENS} tokens, generated with a KV cache. steps[s] is the distribution "
    "that token s was taken from, of one pass over prompt and continuation: top5 = [token id, "
    "natural-log probability], margin = best logit minus second-best. perplexity, where present: "
    "over windows of 512 tokens, each a sequence of its own of which the first token only serves "
    "as context.")

if __name__ == "__main__":
    sys.exit(main())
