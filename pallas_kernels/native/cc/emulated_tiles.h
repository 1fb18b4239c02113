// The instructions of matrix tiles in C++, by the names that compilers give them: for tests of what
// is written for tiles on processors without any, and under AddressSanitizer, which does not see
// the instructions' reads and writes. Sums are rounded in another order than the processor's.
#pragma once

#include <immintrin.h>

#include <limits>

#include "vector.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace fnml::tiles {

using Emulated = Vec[16];
inline thread_local Emulated emulated[8];

inline void fill_all(float value) {
  for (Emulated& tile : emulated)
    for (Vec& row : tile) row = splat(value);
}

inline void _tile_loadconfig(const void*) { fill_all(0.0f); }

// Without a configuration the processor refuses; here what is computed is not a number.
inline void _tile_release() { fill_all(std::numeric_limits<float>::quiet_NaN()); }

inline void _tile_loadd(int to, const void* at, std::int64_t row) {
  for (int i = 0; i < 16; ++i)
    emulated[to][i] = load(reinterpret_cast<const float*>(static_cast<const char*>(at) + i * row));
}

inline void _tile_stored(int from, void* at, std::int64_t row) {
  for (int i = 0; i < 16; ++i)
    store(reinterpret_cast<float*>(static_cast<char*>(at) + i * row), emulated[from][i]);
}

inline void _tile_zero(int tile) {
  for (Vec& row : emulated[tile]) row = Vec{};
}

// Of each word the lower and the upper half, bfloat16 numbers, as floats.
inline Vec lower(Vec words) { return reinterpret_cast<Vec>(reinterpret_cast<Ints>(words) << 16); }
inline Vec upper(Vec words) {
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(words) & -0x10000);
}

inline void _tile_dpbf16ps(int sum, int left, int right) {
  for (int i = 0; i < 16; ++i) {
    Vec total{};  // the processor too adds these up apart
    const Vec low = lower(emulated[left][i]), high = upper(emulated[left][i]);
    for (int k = 0; k < 16; ++k) {
      const Vec words = emulated[right][k];
      total += low[k] * lower(words) + high[k] * upper(words);
    }
    emulated[sum][i] += total;
  }
}

}  // namespace fnml::tiles
