// Runs of floats of any length, vector by vector; the last one may be a part of a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace fnml {

// A vector all of whose lanes lie in memory.
struct Whole {
  static Vec load(const float* at) { return fnml::load(at); }
  static void store(float* at, Vec x) { fnml::store(at, x); }
  static Vec keep(Vec x) { return x; }
};

// A vector of which only the first lanes lie in memory: the others read as 0, and are not written.
struct Part {
  std::size_t lanes;

  Vec load(const float* at) const {
    Vec x{};
    std::memcpy(&x, at, lanes * sizeof(float));
    return x;
  }
  void store(float* at, Vec x) const { std::memcpy(at, &x, lanes * sizeof(float)); }
  Vec keep(Vec x) const { return iota() < static_cast<std::int32_t>(lanes) ? x : Vec{}; }
};

// Call work(i, vector) for i = 0, kLanes, ... below count; `vector` is Whole or Part.
template <typename Work>
inline void each_vector(std::int64_t count, const Work& work) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) work(i, Whole{});
  if (i < count) work(i, Part{static_cast<std::size_t>(count - i)});
}

// 1 / (1 + exp(-x)); 0 where that is no normal number, so that large factors find nothing there.
inline Vec sigmoid(Vec x) {
  const Vec share = 1.0f / (1.0f + exp2(x * -1.44269504f));
  return x < -87.0f ? Vec{} : share;
}

}  // namespace fnml
