// Products of matrices on matrix tiles: C = bias + A B.
//
// An entry of C is one chain of sums along the depth, or two by the shape alone, whatever the
// blocks: how C is divided does not change a bit of it.
#pragma once

#include <atomic>

#include "matrices.h"
#include "parallel.h"
#include "span.h"
#include "tiles.h"

namespace fnml::tiled {

#if FNML_TILES

using tiles::kBlock;
using tiles::kSide;

// Numbers of a block of B, which stays in a core's second cache.
constexpr std::int64_t kNumbers = 1 << 17;
// The depth of a block: two panels of A stay in the first cache, unless C is so narrow that reading
// and writing it again with each block would cost more.
constexpr std::int64_t kDepth = 128, kNarrowDepth = 512;
// The depth from which, and numbers of C up to which, C is the sum of two halves.
constexpr std::int64_t kHalved = 1024, kSmall = 1 << 18;
constexpr std::int64_t kPair = 2 * kSide;  // rows and columns of C at a time

// Add columns of B over some of the depth to p.sums, or begin them.
inline void add_up(const Problem& p, Range columns, Range depth) {
  each_vector(columns.size(), [&](std::int64_t n, auto lanes) {
    const float* from = p.b.at + depth.start * p.b.row + columns.start + n;
    Vec total{};
    for (std::int64_t k = 0; k < depth.size(); ++k) total += lanes.load(from + k * p.b.row);
    float* to = p.sums + columns.start + n;
    lanes.store(to, depth.start ? lanes.load(to) + total : total);
  });
}

// The numbers that a block of C starts from; null for 0.
struct Start {
  const float* at;
  std::int64_t row;
};

// A block of C, at most kPair rows and columns of it.
inline void block_of_c(const Problem& p, Range rows, Range columns, std::int64_t depth_blocks,
                       std::int64_t apart, const float* left, const float* right, bool first) {
  float* c = p.c + rows.start * p.columns + columns.start;
  Start start = !first   ? Start{c, p.columns}
                : p.bias ? Start{p.bias + columns.start, 0}
                         : Start{nullptr, 0};
  const bool whole = rows.size() % kSide == 0 && columns.size() % kSide == 0;
  // What reaches beyond C's end is computed elsewhere, and a part copied.
  alignas(64) float aside[kPair * kPair];
  float* to = whole ? c : aside;
  const std::int64_t to_row = whole ? p.columns : kPair;
  if (!whole) std::memset(aside, 0, sizeof aside);
  if (!whole && start.at) {
    for (std::int64_t i = 0; i < rows.size(); ++i)
      std::memcpy(aside + i * kPair, start.at + i * start.row, columns.size() * sizeof(float));
    start = {aside, kPair};
  }
  const auto run = rows.size() > kSide
                       ? (columns.size() > kSide ? tiles::product<2, 2> : tiles::product<2, 1>)
                       : (columns.size() > kSide ? tiles::product<1, 2> : tiles::product<1, 1>);
  run(depth_blocks, left, apart, right, apart, start.at, start.row, to, to_row);
  if (!whole)
    for (std::int64_t i = 0; i < rows.size(); ++i)
      std::memcpy(c + i * p.columns, aside + i * kPair, columns.size() * sizeof(float));
}

// A matrix from some row and column on, as tiles take it: B's columns are their rows.
inline tiles::Operand operand(Matrix x, std::int64_t row, std::int64_t column, bool right) {
  const float* at = x.at + row * x.row + column * x.column;
  return right ? tiles::Operand{at, x.column, x.row} : tiles::Operand{at, x.row, x.column};
}

// Ask for rows of a matrix, which lie in memory, some time before they are read.
inline void fetch(Matrix x, Range rows, Range columns) {
  for (std::int64_t i = rows.start; i < rows.stop; ++i)
    for (std::int64_t j = columns.start; j < columns.stop; j += kLanes)
      __builtin_prefetch(x.at + i * x.row + j, 0, 2);
}

// Compute a part of C, and tell whether the operands allowed it.
inline bool multiply_part(const Problem& p, Range rows, Range columns) {
  const tiles::Registers registers;
  // By C's columns, not by those of this part: the sums of B follow the blocks.
  const std::int64_t most_deep = p.columns <= kNumbers / kNarrowDepth ? kNarrowDepth : kDepth;
  const auto words = [](std::int64_t numbers) {
    return blocks(numbers, kSide * tiles::kDepth) * kBlock;
  };
  float* left = scratch(words(kPair * most_deep) + words(kNumbers));
  float* right = left + words(kPair * most_deep);
  Vec odd{};
  each(columns, kNumbers / most_deep, [&](Range across) {
    each({0, p.depth}, most_deep, [&](Range depth) {
      const std::int64_t deep = blocks(depth.size(), tiles::kDepth), apart = deep * kBlock;
      const auto panel = [&](Range some) {
        return right + (some.start - across.start) / kSide * apart;
      };
      each(across, kSide, [&](Range some) {
        if (p.sums && rows.start == 0) add_up(p, some, depth);
        tiles::pack<false>(operand(p.b, depth.start, some.start, true), some.size(), depth.size(),
                           panel(some), odd);
      });
      each(rows, kPair, [&](Range down) {
        each(down, kSide, [&](Range some) {
          tiles::pack<true>(operand(p.a, some.start, depth.start, false), some.size(), depth.size(),
                            left + (some.start - down.start) / kSide * apart, odd);
        });
        const std::int64_t pairs = blocks(across.size(), kPair);
        each(across, kPair, [&](Range some) {
          // What is copied next comes from memory meanwhile.
          if (!p.copied) {
            const Range later{down.stop, std::min(down.stop + kPair, rows.stop)};
            fetch(p.a, part(later, (some.start - across.start) / kPair, pairs, 1), depth);
          }
          block_of_c(p, down, some, deep, apart, left, panel(some), depth.start == 0);
        });
      });
    });
  });
  return sum(odd) == 0.0f;
}

// Compute C in parts; several problems at once, and tell whether their operands allowed it.
template <std::size_t Count>
bool multiply_all(xla::ffi::ThreadPool& pool, const Problem (&problems)[Count]) {
  const Problem& one = problems[0];
  // Turning what is copied costs as much as splitting it.
  const Division by{kPair,   kPair,  one.copied ? 60 : 50, one.b.column == 1 ? 50 : 60,
                    1 << 21, 1 << 28};
  const Grid grid = divide(one, by, std::max<std::int64_t>(1, pool.num_threads() / Count));
  std::atomic<bool> odd{false};
  parallel(pool, Count * grid.down * grid.across, [&](std::int64_t piece) {
    const Problem& p = problems[piece % Count];
    const std::int64_t down = piece / Count / grid.across, across = piece / Count % grid.across;
    if (!multiply_part(p, part({0, p.rows}, down, grid.down, by.rows),
                       part({0, p.columns}, across, grid.across, by.columns)))
      odd.store(true, std::memory_order_relaxed);
  });
  return !odd.load(std::memory_order_relaxed);
}

// A small C of a great depth as the sum of its halves: then no thread copies what another does.
inline bool multiply_halves(xla::ffi::ThreadPool& pool, const Problem& p) {
  thread_local std::vector<float> space;
  const std::int64_t size = p.rows * p.columns, half = p.depth / 2 / kDepth * kDepth;
  if (space.size() < static_cast<std::size_t>(size + p.columns)) space.resize(size + p.columns);
  float* other = space.data();
  Problem first = p, second = p;
  first.depth = half;
  second.depth = p.depth - half;
  second.a.at += half * p.a.column;
  second.b.at += half * p.b.row;
  second.c = other;
  if (p.sums) second.sums = other + size;
  if (!multiply_all(pool, {first, second})) return false;
  const auto add = [](float* to, const float* from, Range some) {
    each_vector(some.size(), [&](std::int64_t i, auto lanes) {
      i += some.start;
      lanes.store(to + i, lanes.load(to + i) + lanes.load(from + i));
    });
  };
  const std::int64_t pieces = blocks(size, 1 << 16);
  parallel(pool, pieces, [&](std::int64_t i) { add(p.c, other, part({0, size}, i, pieces, 1)); });
  if (p.sums) add(p.sums, other + size, {0, p.columns});
  return true;
}

// Return whether C was computed: if not, this process may not use tiles, or a number is not finite.
inline bool multiply(xla::ffi::ThreadPool& pool, const Problem& p) {
  if (!tiles::allowed()) return false;
  // By the shape alone, as the halves' sum has other bits.
  if (p.copied && p.depth >= kHalved && p.rows * p.columns <= kSmall)
    return multiply_halves(pool, p);
  return multiply_all(pool, {p});
}

#else

inline bool multiply(xla::ffi::ThreadPool&, const Problem&) { return false; }

#endif

}  // namespace fnml::tiled
