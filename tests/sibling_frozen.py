"""References of the siblings with factors that are frozen, constant or tied: see `sibling_references.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sibling_base import Shapes, Sibling, kron_flops, kron_rank, tile


@dataclass(frozen=True)
class GraLoRA(Sibling):
    """Block (i, j) of a k x k grid has rank r / k: the i-th part of A_j's columns, the j-th of B_i's rows."""

    name = "GraLoRA"
    paper = "2505.20355 GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (peft)"
    formula = "alpha / r [B_ij A_ij]_ij, k x k blocks"
    r: int = 32
    k: int = 2
    alpha: float = 64

    def tensors(self, m, n):
        return {"gralora_A": (self.k, n // self.k, self.r), "gralora_B": (self.k, self.r, m // self.k)}

    def count(self, m, n):
        return self.r * (m + n)

    def update(self, t, m, n):
        part = self.r // self.k
        rows = []
        for i in range(self.k):
            A = [t["gralora_A"][j, :, i * part : (i + 1) * part] for j in range(self.k)]
            B = [t["gralora_B"][i, j * part : (j + 1) * part] for j in range(self.k)]
            rows.append(torch.cat([(a @ b).T for a, b in zip(A, B, strict=True)], 1))
        return self.alpha / self.r * torch.cat(rows, 0)

    def flops(self, m, n):
        return 2 * self.r * (m + n)

    def rank(self, m, n):
        block = min(self.r // self.k, m // self.k, n // self.k)
        return min(m, n, self.k**2 * block)


@dataclass(frozen=True)
class MELoRA(Sibling):
    """N mini-LoRAs of rank r side by side; shared: all N are the same one."""

    name = "MELoRA"
    paper = "2402.17263 MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning (code)"
    formula = "alpha / r blockdiag(B_1 A_1, ..., B_N A_N)"
    N: int = 4
    r: int = 8
    alpha: float = 16
    shared: bool = False

    def tensors(self, m, n):
        out: Shapes = {}
        for i in range(1 if self.shared else self.N):
            out |= {f"lora_A.{i}": (self.r, n // self.N), f"lora_B.{i}": (m // self.N, self.r)}
        return out

    def count(self, m, n):
        return self.r * (m + n) // (self.N if self.shared else 1)

    def update(self, t, m, n):
        which = [0] * self.N if self.shared else range(self.N)
        return torch.block_diag(*(self.alpha / self.r * t[f"lora_B.{i}"] @ t[f"lora_A.{i}"] for i in which))

    def flops(self, m, n):
        return 2 * self.r * (m + n)

    def rank(self, m, n):
        return self.N * min(self.r, m // self.N, n // self.N)


@dataclass(frozen=True)
class MoRA(Sibling):
    """M is s x s; kind: the original's compression and decompression.

    "sharing" (its type 1) adds up the input's chunks of s and repeats the output; "decoupled" applies M to
    each chunk; "rotary" (type 6) first rotates chunk i by i times RoPE's angles, halves paired. All lengthen
    the input to whole chunks by its own beginning, and repeat and crop the output.
    """

    name = "MoRA"
    paper = "2405.12130 MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning (code)"
    formula = "decompress(M compress(x))"
    s: int
    kind: str = "sharing"

    def tensors(self, m, n):
        return {"M": (self.s, self.s)}

    def count(self, m, n):
        return self.s**2

    def update(self, t, m, n):
        chunks = math.ceil(n / self.s)
        x = tile(torch.eye(n, dtype=t["M"].dtype), chunks * self.s).reshape(n, chunks, self.s)
        if self.kind == "sharing":
            x = x.sum(1, keepdim=True)
        elif self.kind == "rotary":
            angle = torch.arange(chunks, dtype=x.dtype)[:, None] / 10000 ** (
                torch.arange(0, self.s, 2, dtype=x.dtype) / self.s
            )
            first, second = x.chunk(2, -1)
            x = torch.cat(
                (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
            )
        return tile((x @ t["M"].T).flatten(1), m).T

    def flops(self, m, n):
        return 2 * self.s**2 + n if self.kind == "sharing" else 2 * self.s**2 * math.ceil(n / self.s)

    def rank(self, m, n):
        return min(m, n, self.s if self.kind == "sharing" else math.ceil(n / self.s) * self.s)


def mora_size(m: int, n: int, r: int, even: bool = False) -> int:
    """MoRA's s for the parameters of a rank-r LoRA: nearest integer; the rotary kind needs it even."""
    s = int(math.sqrt((m + n) * r) + 0.5)
    return s // 2 * 2 if even else s


@dataclass(frozen=True)
class MiSS(Sibling):
    """Adds up the input's chunks of r (padded by zeros); `mini` shares miss_block between outputs too."""

    name = "MiSS (Bone)"
    paper = "2409.15371 MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing ... (peft)"
    formula = "y = (sum_j x[j r : (j + 1) r]) miss_block"
    r: int = 64
    mini: int | None = None

    def tensors(self, m, n):
        return {"miss_block": (self.r, self.mini or m)}

    def count(self, m, n):
        return self.r * (self.mini or m)

    def update(self, t, m, n):
        x = torch.nn.functional.pad(torch.eye(n, dtype=t["miss_block"].dtype), (0, -n % self.r))
        return (x.reshape(n, -1, self.r).sum(1) @ tile(t["miss_block"], m)).T

    def flops(self, m, n):
        return n + 2 * self.r * (self.mini or m)

    def rank(self, m, n):
        return min(self.r, self.mini or m, n)


@dataclass(frozen=True)
class C3A(Sibling):
    """Block (i, j) is the circulant matrix with first row c3a_kernel[i, j], over n."""

    name = "C3A"
    paper = "2407.19342 Parameter-Efficient Fine-Tuning via Circular Convolution (peft)"
    formula = "dW[i b + p, j b + q] = c3a_kernel[i, j, (q - p) mod b] / n"
    b: int = 256

    def tensors(self, m, n):
        return {"c3a_kernel": (m // self.b, n // self.b, self.b)}

    def count(self, m, n):
        return m * n // self.b

    def update(self, t, m, n):
        index = (torch.arange(n)[None] - torch.arange(m)[:, None]) % self.b  # b divides i b and j b
        rows, columns = torch.arange(m)[:, None] // self.b, torch.arange(n)[None] // self.b
        return t["c3a_kernel"][rows, columns, index] / n

    def flops(self, m, n):
        """By FFT: 5 b log2 b for each of a length b, 8 for a complex multiply-add."""
        return round(5 * (m + n) * math.log2(self.b)) + 8 * m * n // self.b

    def rank(self, m, n):
        return min(m, n)


@dataclass(frozen=True)
class VeRA(Sibling):
    """vera_A and vera_B are random, frozen, and shared by all layers."""

    name = "VeRA"
    paper = "2310.11454 VeRA: Vector-based Random Matrix Adaptation (peft)"
    formula = "diag(lambda_b) vera_B diag(lambda_d) vera_A"
    r: int = 256

    def tensors(self, m, n):
        return {"vera_lambda_b": (m,), "vera_lambda_d": (self.r,)}

    def given(self, m, n):
        return {"vera_A": (self.r, n), "vera_B": (m, self.r)}

    def count(self, m, n):
        return m + self.r

    def update(self, t, m, n):
        return torch.diag(t["vera_lambda_b"]) @ t["vera_B"] @ torch.diag(t["vera_lambda_d"]) @ t["vera_A"]

    def flops(self, m, n):
        return 2 * self.r * (m + n) + self.r + m

    def rank(self, m, n):
        return min(m, n, self.r)


@dataclass(frozen=True)
class KronVeRA(Sibling):
    """A_i [a, b], B_i [c, d] random and frozen; row scales alpha_a [a], alpha_c [c] shared by the k terms."""

    name = "Kron-VeRA"
    paper = "none"
    formula = "sum_i g_i (diag(scale_a) A_i) kron (diag(scale_c) B_i)"
    a: int
    b: int
    k: int = 4

    def tensors(self, m, n):
        return {"g": (self.k,), "scale_a": (self.a,), "scale_c": (m // self.a,)}

    def given(self, m, n):
        return {"A": (self.k, self.a, self.b), "B": (self.k, m // self.a, n // self.b)}

    def count(self, m, n):
        return self.a + m // self.a + self.k

    def update(self, t, m, n):
        blocks = torch.einsum("i,a,iab,c,icd->acbd", t["g"], t["scale_a"], t["A"], t["scale_c"], t["B"])
        return blocks.reshape(m, n)

    def flops(self, m, n):
        return self.k * kron_flops(self.a, self.b, m // self.a, n // self.b) + 2 * m

    def rank(self, m, n):
        return min(m, n, self.k * kron_rank(self.a, self.b, m // self.a, n // self.b))


@dataclass(frozen=True)
class LoRAXS(Sibling):
    """Frozen: W's truncated SVD, lora_A [r, n] with the singular values, lora_B [m, r] the left vectors."""

    name = "LoRA-XS"
    paper = "2405.17604 LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (code)"
    formula = "alpha / r lora_B R lora_A"
    r: int = 8
    alpha: float = 8

    def tensors(self, m, n):
        return {"R": (self.r, self.r)}

    def given(self, m, n):
        return {"lora_A": (self.r, n), "lora_B": (m, self.r)}

    def count(self, m, n):
        return self.r**2

    def update(self, t, m, n):
        return self.alpha / self.r * t["lora_B"] @ t["R"] @ t["lora_A"]

    def flops(self, m, n):
        return 2 * self.r * (m + n + self.r)

    def rank(self, m, n):
        return min(m, n, self.r)


@dataclass(frozen=True)
class MoKAXS(Sibling):
    """A full k x k gate matrix between frozen A_i [a, b] and B_j."""

    name = "MoKA-XS"
    paper = "none"
    formula = "sum_ij M_ij A_i kron B_j"
    a: int
    b: int
    k: int = 4

    def tensors(self, m, n):
        return {"M": (self.k, self.k)}

    def given(self, m, n):
        return {"A": (self.k, self.a, self.b), "B": (self.k, m // self.a, n // self.b)}

    def count(self, m, n):
        return self.k**2

    def update(self, t, m, n):
        rearranged = t["A"].flatten(1).T @ t["M"] @ t["B"].flatten(1)  # P M Q^T, [ab, cd]
        return rearranged.reshape(self.a, self.b, m // self.a, n // self.b).transpose(1, 2).reshape(m, n)

    def flops(self, m, n):
        c, d = m // self.a, n // self.b
        first_b = 2 * self.k * self.b * c * (self.a + d + self.k)
        first_a = 2 * self.k * self.a * d * (self.b + c + self.k)
        return min(first_a, first_b)

    def rank(self, m, n):
        return min(m, n, self.k * kron_rank(self.a, self.b, m // self.a, n // self.b))


@dataclass(frozen=True)
class KRAdapter(Sibling):
    """Khatri-Rao along the longer side: row (m <= n) or else column i of dW is v_weight[i] kron weight[i]."""

    name = "KRAdapter"
    paper = "2508.00230 Towards Higher Effective Rank in PEFT using Khatri-Rao Product (code)"
    formula = "scale [v_weight_i kron weight_i]_i, cropped"
    scale: float = 2.0

    def tensors(self, m, n):
        small, large = sorted((m, n))
        d = math.isqrt(small)
        return {"weight": (small, d), "v_weight": (small, math.ceil(large / d))}

    def count(self, m, n):
        d = math.isqrt(min(m, n))
        return min(m, n) * (d + math.ceil(max(m, n) / d))

    def update(self, t, m, n):
        long = (t["v_weight"][:, :, None] * t["weight"][:, None, :]).flatten(1)[:, : max(m, n)]
        return self.scale * (long if m <= n else long.T)

    def flops(self, m, n):
        """That of a dense product: better merged into the weight (one multiply per element)."""
        return 2 * m * n

    def rank(self, m, n):
        return min(m, n)


@dataclass(frozen=True)
class QAMoKA(Sibling):
    """A mixture on the sums of q neighbouring inputs: it merges into the zero points of groups of q."""

    name = "QA-MoKA"
    paper = "none; the grouping of 2309.14717 QA-LoRA: Quantization-Aware Low-Rank Adaptation ..."
    formula = "sum_i softmax(gate)_i A_i kron (B_i kron 1_{1 x q})"
    a: int
    b: int
    q: int
    k: int = 4

    def tensors(self, m, n):
        return {
            "gate": (self.k,),
            "A": (self.k, self.a, self.b),
            "B": (self.k, m // self.a, n // self.b // self.q),
        }

    def count(self, m, n):
        return self.k * (self.a * self.b + m * n // (self.a * self.b * self.q) + 1)

    def update(self, t, m, n):
        blocks = torch.einsum("i,iab,icd->acbd", t["gate"].softmax(0), t["A"], t["B"])
        pool = torch.eye(n, dtype=blocks.dtype).reshape(n // self.q, self.q, n).sum(1)
        return blocks.reshape(m, n // self.q) @ pool

    def flops(self, m, n):
        return n + self.k * kron_flops(self.a, self.b, m // self.a, n // self.b // self.q)

    def rank(self, m, n):
        terms = self.k * kron_rank(self.a, self.b, m // self.a, n // self.b // self.q)
        return min(m, n // self.q, terms)
