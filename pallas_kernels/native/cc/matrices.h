// Products of matrices in memory, and how they are divided into blocks and among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product.h"

namespace fnml {

// C = bias + A B, all in memory.
struct Problem {
  std::int64_t rows, columns, depth;
  Matrix a, b;
  const float* bias;  // [columns], or null
  float* c;           // [rows, columns]
  bool copied;        // whether A's columns are contiguous, else its rows are
  float* sums;  // [columns]: where A's columns are contiguous, B summed over the depth; or null
  bool adds = false;  // to what C holds, which its bias is part of
};

struct Range {
  std::int64_t start, stop;
  std::int64_t size() const { return stop - start; }
};

inline std::int64_t blocks(std::int64_t size, std::int64_t most) {
  return (size + most - 1) / most;
}

// The i-th of `parts` nearly equal parts, whose bounds are multiples of `unit`.
inline Range part(Range all, std::int64_t i, std::int64_t parts, std::int64_t unit) {
  const std::int64_t units = blocks(all.size(), unit);
  return {all.start + units * i / parts * unit,
          std::min(all.stop, all.start + units * (i + 1) / parts * unit)};
}

// Call work(part) for parts of a range that are `size` long, but for the last one.
template <typename Work>
inline void each(Range all, std::int64_t size, const Work& work) {
  for (std::int64_t i = all.start; i < all.stop; i += size)
    work(Range{i, std::min(i + size, all.stop)});
}

// Memory of this thread, aligned as vectors want it.
inline float* scratch(std::int64_t floats) {
  thread_local std::vector<Vec> space;
  const std::size_t vectors = blocks(floats, kLanes);
  if (space.size() < vectors) space.resize(vectors);
  return reinterpret_cast<float*>(space.data());
}

// What decides how C is divided.
struct Division {
  std::int64_t rows, columns;   // whose multiples the parts' bounds are
  std::int64_t a_cost, b_cost;  // of copying a row of A, a column of B: in entries of C
  std::int64_t least_work;      // multiply-adds of a piece: it should outlast a thread's start
  std::int64_t most_work;       // it should leave no thread idle for long at the end
};

// How C is divided: the parts of its rows and of its columns.
struct Grid {
  std::int64_t down, across;
};

inline Grid divide(const Problem& p, const Division& by, std::int64_t threads) {
  const std::int64_t work = p.rows * p.columns * p.depth;
  const std::int64_t rounds = std::clamp<std::int64_t>(work / (threads * by.most_work), 1, 4);
  const std::int64_t pieces = std::min(threads * rounds, 1 + work / by.least_work);
  const std::int64_t most_down = blocks(p.rows, by.rows);
  const std::int64_t most_across = blocks(p.columns, by.columns);
  Grid best{1, 1};
  std::int64_t least = -1;
  for (std::int64_t across = 1; across <= std::min(pieces, most_across); ++across) {
    const std::int64_t down = std::min(pieces / across, most_down);
    const std::int64_t rows = blocks(most_down, down) * by.rows;
    const std::int64_t columns = blocks(most_across, across) * by.columns;
    // Rounds that threads go through together.
    const std::int64_t turns = blocks(down * across, threads);
    const std::int64_t cost = turns * (rows * columns + rows * by.a_cost + columns * by.b_cost);
    if (least < 0 || cost < least) best = {down, across}, least = cost;
  }
  return best;
}

}  // namespace fnml
