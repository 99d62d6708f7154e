// The component shapes that the Hopper gradient kernel is compiled for, and how a thread block is laid out for each.
#pragma once

#include "kron_grad_sm90.h"

namespace moka::cuda {

constexpr int kGradSmem = 232448;  // bytes of shared memory a thread block may have
constexpr int kGradBarriers = 1024;

// Slots for the operand held for a whole tile: two tiles, so that the next one's is there for the side that starts
// with it; more when that is its share of the bytes.
constexpr int slots_held(int chunks, int slot, int64_t rings, int64_t other_tile) {
  const int share = static_cast<int>(rings * chunks * slot / (chunks * slot + other_tile) / slot);
  return share > 2 * chunks ? share : 2 * chunks;
}

// A token of T1 is a matrix [S1, L1], of T2 a matrix [L2, S2]; kron_grad_sm90.cuh explains. S1 and L2 are the most that
// a component may have.
// kCost: cycles of a token on an H200, its group alone on 26 multiprocessors, and a tenth more for the group that then
// ended last among all, where that is faster; for 1024 x 4096 in proportion to the wgmma instructions.
template <int S1_, int L1_, int L2_, int S2_, int kCost, int kPair_ = 2>
struct GradShape {
  static constexpr int kS1 = S1_, kL1 = L1_, kL2 = L2_, kS2 = S2_, kPair = kPair_;
  static constexpr int kP1 = S1_ <= 8 ? 8 : S1_ <= 16 ? 16 : S1_ <= 32 ? 32 : S1_ <= 64 ? 64 : 128;  // S1 padded
  static constexpr int kTokens = 64 / (kP1 < kS2 ? kP1 : kS2);                                       // of a tile
  static constexpr int kRows1 = kTokens * kP1, kRows2 = kTokens * kS2;                               // 64 to 256
  static_assert(kL1 % 64 == 0 && kL2 % 16 == 0 && kRows1 % 64 == 0 && kRows2 % 64 == 0);

  // T1 arrives in chunks of 64 columns, T2 in chunks of 64 rows.
  static constexpr int kChunks1 = kL1 / 64, kChunks2 = (kL2 + 63) / 64;
  static constexpr int kSlot1 = kRows1 * 128, kSlot2 = kRows2 * 128;

  // Shared memory: the components' factors, side by side, the intermediates, and a ring of chunks of each T.
  static constexpr int kFactor1 = kChunks1 * kPair * kS2 * 128, kFactor2 = kChunks2 * kPair * kP1 * 128;
  static constexpr int kMiddle0 = kRows2 * kPair * kP1 * 2, kMiddle1 = kRows1 * kPair * kS2 * 2;
  static constexpr int kFixed = kFactor1 + kFactor2 + kMiddle0 + kMiddle1;
  static constexpr int kRings = kGradSmem - kGradBarriers - kFixed;

  // The operand with fewer bytes in a tile is held, the other flows.
  static constexpr int kTile1 = kChunks1 * kSlot1, kTile2 = kChunks2 * kSlot2;
  static constexpr bool kHolds1 = kTile1 < kTile2;
  static constexpr int kHeld =
      kHolds1 ? slots_held(kChunks1, kSlot1, kRings, kTile2) : slots_held(kChunks2, kSlot2, kRings, kTile1);
  static constexpr int kSlots1 = kHolds1 ? kHeld : (kRings - kHeld * kSlot2) / kSlot1;
  static constexpr int kSlots2 = kHolds1 ? (kRings - kHeld * kSlot1) / kSlot2 : kHeld;
  static constexpr int kUsed = kFixed + kSlots1 * kSlot1 + kSlots2 * kSlot2;
  static_assert(kSlots1 >= 3 && kSlots2 >= 2 && (2 * (kSlots1 + kSlots2) + 1) * 8 <= kGradBarriers);

  static constexpr bool kExact = false, kMaps2 = kS2 == 64;  // T2 by a tensor map, of rows of 128 bytes

  static constexpr double cost() { return kCost; }
};

// The same for kron_grad_square_sm90.cu: S1 = S2 = S, L1 = L2 = 4096 / S.
template <int S>
struct GradSquareShape {
  static constexpr int kS1 = S, kL1 = 4096 / S, kL2 = kL1, kS2 = S, kP1 = S, kTokens = 64 / S, kPair = 2;
  static constexpr bool kExact = true, kMaps2 = true;

  static constexpr double cost() { return S == 64 ? 1024 : S == 32 ? 530 : 500; }  // cycles, measured on an H200
};

template <class... Shapes>
struct GradFamily {};

// Shapes that moka/rules.py plans, without the mirrored ones, and what has the same B and a smaller A.
// 4096 x 4096
using GradSquare = GradFamily<GradSquareShape<16>, GradSquareShape<32>, GradSquareShape<64>>;
// 14336 x 4096 and 4096 x 14336; 12288 x 4096
using GradMlp =
    GradFamily<GradShape<28, 512, 256, 16, 1715>, GradShape<56, 256, 128, 32, 2345>, GradShape<112, 128, 64, 64, 4700>,
               GradShape<32, 128, 224, 64, 2250>, GradShape<16, 256, 448, 32, 1705>>;
// 11008 x 4096 and 4096 x 11008, where 43 is prime
using GradMlp43 =
    GradFamily<GradShape<43, 256, 256, 16, 1450, 1>, GradShape<43, 256, 128, 32, 2350>,
               GradShape<86, 128, 64, 64, 4210>, GradShape<32, 128, 176, 64, 1930>, GradShape<16, 256, 352, 32, 1650>>;
// 1024 x 4096; 1024 x 3072
using GradKv =
    GradFamily<GradShape<8, 128, 256, 16, 430>, GradShape<16, 64, 128, 32, 530>, GradShape<64, 64, 32, 32, 930>,
               GradShape<32, 128, 64, 16, 530>, GradShape<16, 256, 128, 8, 430>>;
// 3584 x 3584, 4096 x 2560, 3072 x 3072 ...
using GradMedium =
    GradFamily<GradShape<16, 256, 256, 16, 810>, GradShape<32, 128, 128, 32, 1020>, GradShape<64, 64, 64, 64, 1800>>;

}  // namespace moka::cuda
