"""References of the siblings of which every factor is trained: see `sibling_references.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sibling_base import Shapes, Sibling, kron_flops, kron_rank


@dataclass(frozen=True)
class MoKA(Sibling):
    """shapes: (a, b, c, d) of A_i [a, b] and B_i [c, d]; they may differ."""

    name = "MoKA"
    paper = "2508.03527 MoKA: Mixture of Kronecker Adapters (abstract)"
    formula = "scale sum_i softmax(gate)_i A_i kron B_i"
    shapes: tuple[tuple[int, int, int, int], ...]
    scale: float = 1.0

    def tensors(self, m, n):
        out: Shapes = {"gate": (len(self.shapes),)}
        for i, (a, b, c, d) in enumerate(self.shapes):
            out |= {f"A{i}": (a, b), f"B{i}": (c, d)}
        return out

    def count(self, m, n):
        return sum(a * b + c * d for a, b, c, d in self.shapes) + len(self.shapes)

    def update(self, t, m, n):
        weights = t["gate"].softmax(0)
        blocks = (torch.einsum("ab,cd->acbd", t[f"A{i}"], t[f"B{i}"]) for i in range(len(self.shapes)))
        return self.scale * sum(w * x.reshape(m, n) for w, x in zip(weights, blocks, strict=True))

    def flops(self, m, n):
        return sum(kron_flops(*shape) for shape in self.shapes)

    def rank(self, m, n):
        return min(m, n, sum(kron_rank(*shape) for shape in self.shapes))


@dataclass(frozen=True)
class MoKAs(Sibling):
    """left: sizes p of I_p kron B (block diagonal); right: sizes q of A kron I_q (strided)."""

    name = "MoKA_s"
    paper = "2508.03527 MoKA: Mixture of Kronecker Adapters (abstract)"
    formula = "scale sum_i softmax(gate)_i (I_p kron B_i  or  A_i kron I_q)"
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    scale: float = 1.0

    def tensors(self, m, n):
        out: Shapes = {f"B{i}": (m // p, n // p) for i, p in enumerate(self.left)}
        out |= {f"A{i}": (m // q, n // q) for i, q in enumerate(self.right)}
        return out | {"gate": (len(self.left + self.right),)}

    def count(self, m, n):
        return sum(m * n // size**2 + 1 for size in self.left + self.right)

    def update(self, t, m, n):
        weights = t["gate"].softmax(0)
        out = torch.zeros(m, n, dtype=weights.dtype)
        for i, p in enumerate(self.left):
            out += weights[i] * torch.block_diag(*[t[f"B{i}"]] * p)
        for i, q in enumerate(self.right):
            for s in range(q):
                out[s::q, s::q] += weights[len(self.left) + i] * t[f"A{i}"]
        return self.scale * out

    def flops(self, m, n):
        return sum(2 * m * n // size for size in self.left + self.right)

    def rank(self, m, n):
        return min(m, n)


@dataclass(frozen=True)
class KronA(Sibling):
    """A [a, b]; applied by (A kron B) vec(X) = vec(B X A^T), columns stacked."""

    name = "KronA"
    paper = "2212.10650 KronA: Parameter Efficient Tuning with Kronecker Adapter (abstract)"
    formula = "scale A kron B"
    a: int
    b: int
    scale: float = 1.0

    def tensors(self, m, n):
        return {"A": (self.a, self.b), "B": (m // self.a, n // self.b)}

    def count(self, m, n):
        return self.a * self.b + (m * n) // (self.a * self.b)

    def update(self, t, m, n):
        x = torch.eye(n, dtype=t["A"].dtype).reshape(n, self.b, n // self.b).mT  # columns stacked
        return self.scale * (t["B"] @ x @ t["A"].T).mT.reshape(n, m).T

    def flops(self, m, n):
        return kron_flops(self.a, self.b, m // self.a, n // self.b)

    def rank(self, m, n):
        return kron_rank(self.a, self.b, m // self.a, n // self.b)


@dataclass(frozen=True)
class LoRA(Sibling):
    """rslora: the scale is alpha / sqrt(r) (2312.03732) in place of alpha / r."""

    name = "LoRA"
    paper = "2106.09685 LoRA: Low-Rank Adaptation of Large Language Models (peft)"
    formula = "alpha / r lora_B lora_A"
    r: int = 8
    alpha: float = 8
    rslora: bool = False

    def tensors(self, m, n):
        return {"lora_A": (self.r, n), "lora_B": (m, self.r)}

    def count(self, m, n):
        return self.r * (m + n)

    def update(self, t, m, n):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r) * t["lora_B"] @ t["lora_A"]

    def flops(self, m, n):
        return 2 * self.r * (m + n)

    def rank(self, m, n):
        return min(m, n, self.r)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """LoKr's split of a size: by factor if it divides, else by the largest divisor below it and the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    small = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return small, size // small


@dataclass(frozen=True)
class LoKr(Sibling):
    """w2 is full if r is at least half its longer side, else low-rank; so is w1 with decompose_both."""

    name = "LoKr"
    paper = "2309.14859 Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning ... (peft)"
    formula = "alpha / r lokr_w1 kron lokr_w2, w2 = lokr_w2_a lokr_w2_b"
    r: int = 8
    alpha: float = 8
    decompose_factor: int = -1
    decompose_both: bool = False

    def sides(self, m: int, n: int) -> dict[str, tuple[int, int, bool]]:
        """{w1, w2: (rows, columns, low-rank)}."""
        (a, c), (b, d) = (factorization(size, self.decompose_factor) for size in (m, n))
        return {
            "lokr_w1": (a, b, self.decompose_both and 2 * self.r < max(a, b)),
            "lokr_w2": (c, d, 2 * self.r < max(c, d)),
        }

    def tensors(self, m, n):
        out: Shapes = {}
        for name, (rows, columns, low) in self.sides(m, n).items():
            pair = {f"{name}_a": (rows, self.r), f"{name}_b": (self.r, columns)}
            out |= pair if low else {name: (rows, columns)}
        return out

    def count(self, m, n):
        (a, b, low1), (c, d, low2) = self.sides(m, n).values()
        return (self.r * (a + b) if low1 else a * b) + (self.r * (c + d) if low2 else c * d)

    def update(self, t, m, n):
        w1, w2 = (t[s] if s in t else t[f"{s}_a"] @ t[f"{s}_b"] for s in ("lokr_w1", "lokr_w2"))
        return torch.kron(w1, w2) * (self.alpha / self.r)

    def flops(self, m, n):
        (a, b, _), (c, d, low) = self.sides(m, n).values()  # a low-rank w1 is multiplied out first
        return 2 * self.r * (b * d + a * b + a * c) if low else kron_flops(a, b, c, d)

    def rank(self, m, n):
        ranks = [min(*x[:2], self.r) if x[2] else min(x[:2]) for x in self.sides(m, n).values()]
        return math.prod(ranks)


@dataclass(frozen=True)
class KronLoRA(Sibling):
    """A [a, b]; r columns of B1 and rows of B2. The defaults are those of a reimplementation (Edifice)."""

    name = "Kron-LoRA"
    paper = "2508.01961 Kron-LoRA: Hybrid Kronecker-LoRA Adapters for Scalable ... Fine-tuning (abstract)"
    formula = "alpha / r A kron (B1 B2)"
    a: int = 2
    b: int = 2
    r: int = 8
    alpha: float = 32

    def tensors(self, m, n):
        return {"A": (self.a, self.b), "B1": (m // self.a, self.r), "B2": (self.r, n // self.b)}

    def count(self, m, n):
        return self.a * self.b + self.r * (m // self.a + n // self.b)

    def update(self, t, m, n):
        x = torch.eye(n, dtype=t["A"].dtype).reshape(n, self.b, n // self.b)
        z = x @ t["B2"].T @ t["B1"].T  # the low-rank branch on each of the b slices, which A then mixes
        return self.alpha / self.r * (t["A"] @ z).reshape(n, m).T

    def flops(self, m, n):
        return 2 * self.r * (n + self.a * self.b + m)

    def rank(self, m, n):
        return min(self.a, self.b) * min(self.r, m // self.a, n // self.b)


@dataclass(frozen=True)
class Compacter(Sibling):
    """y = x H with H [n, m] a PHM layer; `phm_rule`, the slow weights, is trained once for all layers."""

    name = "Compacter"
    paper = "2106.04647 Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (code)"
    formula = "H^T, H = sum_i phm_rule_i kron (W_left_i W_right_i)"
    phm_dim: int = 4
    phm_rank: int = 1

    def tensors(self, m, n):
        N, r = self.phm_dim, self.phm_rank
        return {"W_left": (N, n // N, r), "W_right": (N, r, m // N)}

    def given(self, m, n):
        return {"phm_rule": (self.phm_dim,) * 3}

    def count(self, m, n):
        return self.phm_rank * (m + n)

    def update(self, t, m, n):
        fast = torch.bmm(t["W_left"], t["W_right"])
        return torch.einsum("iac,ikp->akcp", t["phm_rule"], fast).reshape(n, m).T

    def flops(self, m, n):
        return 2 * self.phm_rank * self.phm_dim * (m + n + self.phm_dim**2)

    def rank(self, m, n):
        N = self.phm_dim
        return min(m, n, N * N * min(self.phm_rank, m // N, n // N))


@dataclass(frozen=True)
class SoKA(Sibling):
    """Starts as the k leading terms of the weight's Kronecker SVD, the base being the rest; A [a, b]."""

    name = "SoKA"
    paper = "2506.15251 Singular Value Decomposition on Kronecker Adaptation for LLM (abstract)"
    formula = "sum_k sigma_k U_k kron V_k"
    a: int
    b: int
    k: int = 4

    def tensors(self, m, n):
        return {
            "U": (self.k, self.a, self.b),
            "sigma": (self.k,),
            "V": (self.k, m // self.a, n // self.b),
        }

    def count(self, m, n):
        return self.k * (self.a * self.b + m * n // (self.a * self.b) + 1)

    def update(self, t, m, n):
        rearranged = t["U"].flatten(1).T @ torch.diag(t["sigma"]) @ t["V"].flatten(1)  # [ab, cd]
        blocks = rearranged.reshape(self.a, self.b, m // self.a, n // self.b)
        return blocks.transpose(1, 2).reshape(m, n)

    def flops(self, m, n):
        return self.k * kron_flops(self.a, self.b, m // self.a, n // self.b)

    def rank(self, m, n):
        return min(m, n, self.k * kron_rank(self.a, self.b, m // self.a, n // self.b))


@dataclass(frozen=True)
class DoTA(Sibling):
    """Matrix product operator of two cores, bond dimension k; starts as W's own, the base being the rest."""

    name = "DoTA"
    paper = "2412.20891 DoTA: Weight-Decomposed Tensor Adaptation for Large Language Models (abstract)"
    formula = "W[i1 i2, j1 j2] = sum_k core1[i1, j1, k] core2[k, i2, j2]"
    a: int
    b: int
    k: int = 4

    def tensors(self, m, n):
        return {"core1": (1, self.a, self.b, self.k), "core2": (self.k, m // self.a, n // self.b, 1)}

    def count(self, m, n):
        return self.k * (self.a * self.b + m * n // (self.a * self.b))

    def update(self, t, m, n):
        return torch.einsum("xabk,kcdy->acbd", t["core1"], t["core2"]).reshape(m, n)

    def flops(self, m, n):
        return self.k * kron_flops(self.a, self.b, m // self.a, n // self.b)

    def rank(self, m, n):
        return min(m, n, self.k * kron_rank(self.a, self.b, m // self.a, n // self.b))


@dataclass(frozen=True)
class CDKA(Sibling):
    """Component i is rows i, i + r, ... of lora_A and columns i, i + r, ... of lora_B."""

    name = "CDKA"
    paper = "2602.01267 Diving into Kronecker Adapters: Component Design Matters (code but for the scale)"
    formula = "scale sum_i B_i kron A_i, A_i [r1, n / r2], B_i [m / r1, r2]"
    r1: int = 2
    r2: int = 8
    r: int = 4
    scale: float = 1.0

    def tensors(self, m, n):
        return {
            "lora_A": (self.r * self.r1, n // self.r2),
            "lora_B": (m // self.r1, self.r * self.r2),
        }

    def count(self, m, n):
        return self.r * (n * self.r1 // self.r2 + m * self.r2 // self.r1)

    def update(self, t, m, n):
        out = torch.zeros(m, n, dtype=t["lora_A"].dtype)
        for i in range(self.r):
            A, B = t["lora_A"][i :: self.r], t["lora_B"][:, i :: self.r]
            out += (B[:, None, :, None] * A[None, :, None, :]).reshape(m, n)
        return self.scale * out

    def flops(self, m, n):
        return self.r * kron_flops(m // self.r1, self.r2, self.r1, n // self.r2)

    def rank(self, m, n):
        return min(m, n, self.r * kron_rank(m // self.r1, self.r2, self.r1, n // self.r2))
