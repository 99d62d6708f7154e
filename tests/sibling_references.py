"""The published siblings of a gated Kronecker sum, each written as its own paper or code writes it.

Presets are tested against these, so nothing here imports moka. One frozen dataclass per sibling, its fields
the method's options (defaults are the original's where it has any); m is the number of outputs and n of
inputs of the adapted layer. `paper` ends with where the formula was checked: "code" (the authors'
repository), "peft" (its source), "abstract" (no more than the abstract and reviews could be read) or is
"none" for one of our own. Sizes must divide, except where the original pads or crops.

    lora = LoRA(r=4, alpha=8)
    tensors = {name: torch.randn(shape) for name, shape in lora.tensors(m, n).items()}
    dW = lora.update(tensors, m, n)  # with the tensors of lora.given(m, n), where there are any
"""

from sibling_base import Sibling
from sibling_frozen import (
    C3A,
    GraLoRA,
    KRAdapter,
    KronVeRA,
    LoRAXS,
    MELoRA,
    MiSS,
    MoKAXS,
    MoRA,
    QAMoKA,
    VeRA,
    mora_size,
)
from sibling_trained import (
    CDKA,
    Compacter,
    DoTA,
    KronA,
    KronLoRA,
    LoKr,
    LoRA,
    MoKA,
    MoKAs,
    SoKA,
)

__all__ = [
    "C3A",
    "CDKA",
    "EXAMPLES",
    "Compacter",
    "DoTA",
    "GraLoRA",
    "KRAdapter",
    "KronA",
    "KronLoRA",
    "KronVeRA",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MELoRA",
    "MiSS",
    "MoKA",
    "MoKAXS",
    "MoKAs",
    "MoRA",
    "QAMoKA",
    "Sibling",
    "SoKA",
    "VeRA",
    "mora_size",
]  # fmt: skip

#: label -> (sibling, m, n): small sizes, m and n different where possible
EXAMPLES: dict[str, tuple[Sibling, int, int]] = {
    "moka": (MoKA(((2, 6, 6, 4), (4, 4, 3, 6), (12, 1, 1, 24)), scale=3.0), 12, 24),
    "moka_s": (MoKAs(left=(2, 4), right=(3,)), 12, 24),
    "krona": (KronA(3, 4, scale=0.5), 12, 24),
    "lora": (LoRA(r=3, alpha=6), 12, 24),
    "rslora": (LoRA(r=3, alpha=6, rslora=True), 12, 24),
    "lokr": (LoKr(r=4, alpha=2), 12, 30),
    "lokr_low_rank": (LoKr(r=2, alpha=6, decompose_factor=4), 32, 48),
    "lokr_both": (LoKr(r=1, alpha=3, decompose_factor=4, decompose_both=True), 32, 48),
    "kron_lora": (KronLoRA(3, 2, r=2), 12, 24),
    "compacter": (Compacter(phm_dim=2), 12, 24),
    "soka": (SoKA(3, 4, k=2), 12, 24),
    "dota": (DoTA(2, 3, k=2), 12, 24),
    "cdka": (CDKA(r1=2, r2=3, r=2), 12, 24),
    "gralora": (GraLoRA(r=4, k=2, alpha=8), 12, 24),
    "melora": (MELoRA(N=3, r=2), 12, 24),
    "melora_shared": (MELoRA(N=3, r=2, shared=True), 12, 24),
    "mora": (MoRA(4), 12, 24),
    "mora_cropped": (MoRA(5), 13, 24),
    "mora_decoupled": (MoRA(4, "decoupled"), 24, 24),
    "mora_rotary": (MoRA(4, "rotary"), 24, 24),
    "miss": (MiSS(r=4), 12, 24),
    "miss_padded": (MiSS(r=5), 12, 24),
    "miss_mini": (MiSS(r=4, mini=3), 12, 24),
    "c3a": (C3A(4), 12, 24),
    "vera": (VeRA(r=3), 12, 24),
    "kron_vera": (KronVeRA(3, 4, k=2), 12, 24),
    "lora_xs": (LoRAXS(r=3, alpha=6), 12, 24),
    "moka_xs": (MoKAXS(2, 3, k=2), 12, 24),
    "kradapter": (KRAdapter(), 9, 24),
    "kradapter_tall": (KRAdapter(), 24, 9),
    "qa_moka": (QAMoKA(2, 3, q=4, k=2), 12, 24),
}
