// Vectors of floats, as wide as the processor's registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace fnml {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;  // floats in a register
inline constexpr int kRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* at) {
  Vec x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline void store(float* at, Vec x) { std::memcpy(at, &x, sizeof x); }

inline Vec splat(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// The lanes' own numbers: 0, 1, 2, ...
inline Ints iota() {
  Ints x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// 2 ** x. The relative error is below 2e-7; below -126 it is 0, above 127 it is held; NaN stays
// NaN.
inline Vec exp2(Vec x) {
  // Added and taken away again, this leaves the nearest whole number.
  const Vec shift = splat(12582912.0f);
  const Vec held = x < -126.0f ? splat(-126.0f) : x > 127.0f ? splat(127.0f) : x;
  const Vec shifted = held + shift;
  const Vec part = held - (shifted - shift);  // in [-0.5, 0.5]
  Vec y = splat(1.5403530e-4f);               // Taylor's coefficients log(2)**n / n!
  y = y * part + 1.3333558e-3f;
  y = y * part + 9.6181291e-3f;
  y = y * part + 5.5504109e-2f;
  y = y * part + 2.4022651e-1f;
  y = y * part + 6.9314718e-1f;
  y = y * part + 1.0f;
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<Ints>(y) + exponent);
  // The payload of a NaN would be taken for an exponent.
  return x < -126.0f ? Vec{} : x == x ? scaled : x;
}

template <int... Lane>
inline Vec zip_low(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % 2 * kLanes + Lane / 2)...);
}

template <int... Lane>
inline Vec zip_high(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % 2 * kLanes + (kLanes + Lane) / 2)...);
}

// Turn kLanes vectors, the rows of a square, into its columns.
inline void transpose(Vec (&square)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  // Zipping the halves shuffles the rows' numbers into the lanes, one bit a round.
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_low(square[i], square[i + kLanes / 2], lanes);
      next[2 * i + 1] = zip_high(square[i], square[i + kLanes / 2], lanes);
    }
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

}  // namespace fnml
