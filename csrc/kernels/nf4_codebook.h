// The 16 NF4 values and the thresholds between them, once for every backend.
//
// The values are the quantiles of N(0, 1) scaled to [-1, 1] with an exact zero: QLoRA, arXiv 2305.14314, appendix E,
// in the fp32 form that bitsandbytes stores. A scaled weight v gets the code #{i : kNf4Bounds[i] < v}, so the midpoint
// itself belongs to the lower code; a NaN gets 15.
#pragma once

namespace moka {

// A macro, because device code needs a table of its own, in constant memory.
#define MOKA_NF4_CODE                                                                                 \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

constexpr float kNf4Code[16] = {MOKA_NF4_CODE};

#define MOKA_BOUND(i) ((kNf4Code[i] + kNf4Code[i + 1]) / 2)
constexpr float kNf4Bounds[15] = {
    MOKA_BOUND(0),  MOKA_BOUND(1),  MOKA_BOUND(2),  MOKA_BOUND(3),  MOKA_BOUND(4),
    MOKA_BOUND(5),  MOKA_BOUND(6),  MOKA_BOUND(7),  MOKA_BOUND(8),  MOKA_BOUND(9),
    MOKA_BOUND(10), MOKA_BOUND(11), MOKA_BOUND(12), MOKA_BOUND(13), MOKA_BOUND(14),
};
#undef MOKA_BOUND

constexpr int kNf4Zero = 7;                   // the code of 0, which fills the unused nibble of an odd-sized weight
constexpr float kNf4SmallestAbsmax = 1e-38f;  // a block's absmax is raised to this before dividing by it

}  // namespace moka
