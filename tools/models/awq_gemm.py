"""AutoAWQ's gemm layout and round-to-nearest quantization, in numpy.

Written apart from the C++ ones, which are checked against it.
"""

import numpy as np

# Nibble i of a word holds logical column 8 * word + ORDER[i].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantize(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [n,k], z [n,g], s [n,g] fp16) of a weight [n,k], all steps in fp32.

    s = fp16(max(max - min, 1e-5) / 15), then widened; z = clamp(round(-min / s), 0, 15);
    q = clamp(round(w / s) + z, 0, 15); round to even.
    """
    rows, columns = weight.shape
    groups = weight.astype(np.float32).reshape(rows, columns // group_size, group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    spread = np.maximum(high - low, np.float32(1e-5))
    scale = (spread / np.float32(15)).astype(np.float16)
    wide = scale.astype(np.float32)
    zero = np.clip(np.rint(-low / wide), 0, 15)
    q = np.clip(np.rint(groups / wide[:, :, None]) + zero[:, :, None], 0, 15)
    return q.reshape(rows, columns).astype(np.uint8), zero.astype(np.uint8), scale


def pack(values: np.ndarray) -> np.ndarray:
    """int32 [r, n/8] of the 4-bit values [r, n]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(ORDER):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def unpack(words: np.ndarray) -> np.ndarray:
    """uint8 [r, n] of int32 [r, n/8]."""
    values = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.uint8)
    for nibble, column in enumerate(ORDER):
        values[:, column::8] = (words.view(np.uint32) >> np.uint32(4 * nibble)) & np.uint32(15)
    return values


def quantized_tensors(name: str, weight: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    """The tensors that stand for the linear layer `name` in a checkpoint."""
    q, zero, scale = quantize(weight, group_size)
    return {
        f"{name}.qweight": pack(np.ascontiguousarray(q.T)),
        f"{name}.qzeros": pack(np.ascontiguousarray(zero.T)),
        f"{name}.scales": np.ascontiguousarray(scale.T),
    }


def dequantize(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """fp32 [n, k]; the product of a 5-bit integer and an fp16 scale is exact in fp32."""
    q = unpack(tensors[f"{name}.qweight"]).astype(np.float32)
    zero = unpack(tensors[f"{name}.qzeros"]).astype(np.float32)
    scale = tensors[f"{name}.scales"].astype(np.float32)
    group_size = q.shape[0] // zero.shape[0]
    weight = (q - zero.repeat(group_size, axis=0)) * scale.repeat(group_size, axis=0)
    return np.ascontiguousarray(weight.T)
