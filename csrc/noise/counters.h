// Noise contract v1: which Philox counter an element of a tensor draws from. docs/conventions.md
// says the same for users; a change here is a change of the contract's version.
//
//   key  k0, k1 = low and high word of splitmix64(user seed)
//   c0   layer id (24 bits) << 8 | stream (8 bits)     fixed for a launch
//   c1   block of the tensor
//   c2   generation                                    fixed for a launch
//   c3   direction, global index
//
// Blocks of an (rows, cols) matrix; a vector is a matrix of one row:
//
//   normal      1 row x 4 columns, c1 = row * ceil(cols / 4) + col / 4; words (0, 1) make the
//               normals of columns 0 and 1 of the block, words (2, 3) those of columns 2 and 3
//   sign bits   4 rows x 32 columns, c1 = row / 4 * ceil(cols / 32) + col / 32; word row % 4, bit
//               col % 32; a set bit is +1, a clear bit -1
//   words       1 row x 4 columns, c1 as for normals; word col % 4, from which noise/uniform.h makes
//               one uniform number or a pair of them
#pragma once

#include "noise/hd.h"
#include "noise/philox.h"

namespace perturbed {

constexpr int kNoiseContractVersion = 1;

// Streams of one layer: which tensor of its noise a launch draws. Only the layers' families know
// them (perturbed/noise); operators take whole counter words.
enum NoiseStream : uint32_t {
  kStreamWeight = 0,
  kStreamBias = 1,
  kStreamFactorA = 2,   // low rank: [rank, m]
  kStreamFactorB = 3,   // low rank: [rank, n]
  kStreamShared = 4,    // sign-flip and permuted: matrices that all directions share
  kStreamFlipIn = 5,    // signs [1, n]
  kStreamFlipOut = 6,   // signs [1, m]
  kStreamSelectIn = 7,  // selections of noise/permutation.h
  kStreamSelectOut = 8,
  kStreamColumns = 9,  // sparse: selection of columns
  kStreamValues = 10,  // sparse: [count, m]
  // Particle swarms; a particle is a direction, its vector of parameters one row.
  kStreamSwarm = 11,        // coefficients of swarm_move_
  kStreamSwarmStart = 12,   // initial positions
  kStreamSwarmOther = 13,   // what variants of the algorithm draw besides
  kStreamSwarmJiggle = 14,  // noise added to all positions
  // Searches with one loss; candidate c of parameter group g is direction 2^20 g + c.
  kStreamTrials = 15,    // moves that are tried
  kStreamChoices = 16,   // decisions
  kStreamParticle = 17,  // random particles; parameter i is direction i
};

constexpr uint32_t kLayerIds = 1u << 24;
// The layer id under which optimizers draw. Layers count up from 0, so the two never meet.
constexpr uint32_t kOptimizerId = kLayerIds - 1;

constexpr int kNormalBlockCols = 4;
constexpr int kSignBlockRows = 4;
constexpr int kSignBlockCols = 32;
constexpr int kWordBlockCols = 4;

PT_HD constexpr uint32_t stream_counter(uint32_t layer_id, uint32_t stream) {
  return layer_id << 8 | stream;
}

// Finaliser of SplitMix64 (Steele, Lea, Flood 2014), so that neighbouring user seeds give unrelated
// keys. Applied once to the seed that the user gave.
PT_HD constexpr uint64_t splitmix64(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

PT_HD PhiloxKey philox_key(uint64_t mixed_seed) {
  return {static_cast<uint32_t>(mixed_seed), static_cast<uint32_t>(mixed_seed >> 32)};
}

PT_HD int64_t normal_blocks_per_row(int64_t cols) {
  return ceil_div<int64_t>(cols, kNormalBlockCols);
}
PT_HD int64_t sign_blocks_per_row(int64_t cols) { return ceil_div<int64_t>(cols, kSignBlockCols); }

PT_HD int64_t word_blocks_per_row(int64_t cols) { return ceil_div<int64_t>(cols, kWordBlockCols); }

// Blocks of a whole matrix; must stay below 2^32 because c1 is one word.
PT_HD int64_t normal_blocks(int64_t rows, int64_t cols) {
  return rows * normal_blocks_per_row(cols);
}
PT_HD int64_t sign_blocks(int64_t rows, int64_t cols) {
  return ceil_div<int64_t>(rows, kSignBlockRows) * sign_blocks_per_row(cols);
}

}  // namespace perturbed
