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
// Few rows of C are added up aside, block after block of the depth, of which two panels of A stay
// in the first cache; as many of C's numbers as fit beside B. Of more rows a block is deeper
// instead.
constexpr std::int64_t kDepth = 128, kFewRows = 512, kAside = 1 << 18;
constexpr std::int64_t kDeep = 384, kManyRows = 1024;
// The depth from which, and numbers of C up to which, C is the sum of two halves.
constexpr std::int64_t kHalved = 1024, kSmall = 1 << 18;
constexpr std::int64_t kPair = 2 * kSide;  // rows and columns of C at a time

// Products that share an operand: of one A, whose results lie side by side, or the terms of one C.
struct Products {
  std::vector<Problem> parts;
  bool summed = false;

  const Problem& first() const { return parts.front(); }
  // The whole of them as one problem's sizes.
  Problem sizes() const {
    Problem all = first();
    for (std::size_t i = 1; i < parts.size(); ++i)
      (summed ? all.depth : all.columns) += (summed ? parts[i].depth : parts[i].columns);
    return all;
  }
};

// The part that some columns of all results belong to, and which of its columns they are.
struct Place {
  const Problem& problem;
  Range columns;
};

inline Place place(const Products& p, const Problem& term, Range columns) {
  if (p.summed) return {term, columns};
  std::int64_t before = 0;
  const Problem* at = p.parts.data();
  for (; columns.start - before >= at->columns; ++at) before += at->columns;
  return {*at, {columns.start - before, columns.stop - before}};
}

// A block of the depth, of one of the terms.
struct Slice {
  const Problem& problem;
  Range depth;
};

// The blocks of all terms, one after the other.
inline std::int64_t slices(const Products& p, std::int64_t depth) {
  std::int64_t count = 0;
  for (const Problem& term : p.parts) {
    count += blocks(term.depth, depth);
    if (!p.summed) break;
  }
  return count;
}

inline Slice slice_of(const Products& p, std::int64_t depth, std::int64_t i) {
  const Problem* term = p.parts.data();
  for (; i >= blocks(term->depth, depth); ++term) i -= blocks(term->depth, depth);
  return {*term, {i * depth, std::min(term->depth, (i + 1) * depth)}};
}

// How a part of C goes through its operands.
struct Steps {
  std::int64_t rows, columns, depth;
};

inline Steps steps(std::int64_t rows, std::int64_t depth) {
  if (rows <= kFewRows) {
    const std::int64_t most = kAside / (blocks(rows, kPair) * kPair) / kPair * kPair;
    return {kFewRows, std::min(kNumbers / kDepth, most), kDepth};
  }
  const std::int64_t deep =
      blocks(blocks(depth, blocks(depth, kDeep)), tiles::kDepth) * tiles::kDepth;
  return {kManyRows, kNumbers / deep / kPair * kPair, deep};
}

// Add columns of B over some of the depth to p.sums, or begin them.
inline void add_up(const Problem& p, Range columns, Range depth) {
  each_vector(columns.size(), [&](std::int64_t n, auto lanes) {
    const float* from = p.b.at + columns.start + n;
    float* to = p.sums + columns.start + n;
    // By a tile's depth, whatever the blocks.
    each(depth, tiles::kDepth, [&](Range some) {
      Vec total{};
      for (std::int64_t k = some.start; k < some.stop; ++k) total += lanes.load(from + k * p.b.row);
      lanes.store(to, some.start ? lanes.load(to) + total : total);
    });
  });
}

// Where the rows of a block go.
struct Rows {
  float* at;
  std::int64_t row;
};

// A block of a product, at most kPair rows and columns of it, added to `start`, or to 0.
inline void block_product(Range rows, Range columns, std::int64_t depth_blocks, std::int64_t apart,
                          const float* left, const float* right, const float* start,
                          std::int64_t start_row, Rows to) {
  const auto run = rows.size() > kSide
                       ? (columns.size() > kSide ? tiles::product<2, 2> : tiles::product<2, 1>)
                       : (columns.size() > kSide ? tiles::product<1, 2> : tiles::product<1, 1>);
  run(depth_blocks, left, apart, right, apart, start, start_row, to.at, to.row);
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

// The numbers that the first block of C's depth starts from, in memory of which whole vectors may
// be read: the bias in each row, or null for 0.
inline const float* biases(const Problem& p, Range columns, float* space) {
  if (!p.bias || columns.size() % kSide == 0) return p.bias ? p.bias + columns.start : nullptr;
  std::memset(space, 0, kPair * sizeof(float));
  std::memcpy(space, p.bias + columns.start, columns.size() * sizeof(float));
  return space;
}

// Compute a part of C, and tell whether the operands allowed it.
inline bool multiply_part(const Products& p, Range rows, Range columns) {
  const tiles::Registers registers;
  const Problem& one = p.first();
  const Steps by = steps(rows.size(), one.depth);
  const std::int64_t count = slices(p, by.depth);
  // B is read as it lies: some of its rows from one end to the other, or whole columns.
  const std::int64_t along_rows = one.b.column == 1 ? tiles::kDepth : by.depth;
  const auto words = [](std::int64_t numbers) {
    return blocks(numbers, kSide * tiles::kDepth) * kBlock;
  };
  const std::int64_t high = std::min(by.rows, blocks(rows.size(), kPair) * kPair);
  const std::int64_t wide = std::min(by.columns, blocks(columns.size(), kPair) * kPair);
  const std::int64_t kept = count > 1 ? high * wide : 0;
  float* left = scratch(words(kPair * by.depth) + words(wide * by.depth) + kept);
  float* right = left + words(kPair * by.depth);
  float* aside = right + words(wide * by.depth);
  Vec odd{};
  each(columns, by.columns, [&](Range across) {
    each(rows, by.rows, [&](Range part_of_rows) {
      for (std::int64_t i = 0; i < count; ++i) {
        const Slice slice = slice_of(p, by.depth, i);
        const Problem& term = slice.problem;
        const Range depth = slice.depth;
        const bool begins = i == 0, ends = i == count - 1;
        const std::int64_t deep = blocks(depth.size(), tiles::kDepth), apart = deep * kBlock;
        const auto panel = [&](Range some) {
          return right + (some.start - across.start) / kSide * apart;
        };
        if (part_of_rows.start == rows.start || count > 1)
          each(depth, along_rows, [&](Range rows_of_b) {
            const std::int64_t at = (rows_of_b.start - depth.start) / tiles::kDepth * kBlock;
            each(across, kSide, [&](Range some) {
              const auto [q, own] = place(p, term, some);
              if (q.sums && part_of_rows.start == 0) add_up(q, own, rows_of_b);
              tiles::pack<false>(operand(q.b, rows_of_b.start, own.start, true), own.size(),
                                 rows_of_b.size(), panel(some) + at, odd);
            });
          });
        each(part_of_rows, kPair, [&](Range down) {
          const Matrix a = term.a;
          each(down, kSide, [&](Range some) {
            tiles::pack<true>(operand(a, some.start, depth.start, false), some.size(), depth.size(),
                              left + (some.start - down.start) / kSide * apart, odd);
          });
          const std::int64_t pairs = blocks(across.size(), kPair);
          each(across, kPair, [&](Range some) {
            const std::int64_t pair = (some.start - across.start) / kPair;
            // What is copied next comes from memory meanwhile.
            if (!one.copied) {
              const Range later{down.stop, std::min(down.stop + kPair, rows.stop)};
              fetch(a, part(later, pair, pairs, 1), depth);
            }
            const auto [q, own] = place(p, term, some);
            alignas(64) float whole[kPair * kPair], bias[kPair];
            float* c = q.c + down.start * q.columns + own.start;
            // Blocks of C lie one after the other until they are whole.
            float* sum =
                aside + ((down.start - part_of_rows.start) / kPair * pairs + pair) * kPair * kPair;
            const bool fits = down.size() % kSide == 0 && own.size() % kSide == 0;
            const Rows to = !ends  ? Rows{sum, kPair}
                            : fits ? Rows{c, q.columns}
                                   : Rows{whole, kPair};
            block_product(down, own, deep, apart, left, panel(some),
                          begins ? biases(q, own, bias) : sum, begins ? 0 : kPair, to);
            if (to.at == whole)
              for (std::int64_t i = 0; i < down.size(); ++i)
                std::memcpy(c + i * q.columns, whole + i * kPair, own.size() * sizeof(float));
          });
        });
      }
    });
  });
  return sum(odd) == 0.0f;
}

// Compute C in parts; several at once, and tell whether their operands allowed it.
inline bool multiply_all(xla::ffi::ThreadPool& pool, const Products* products, std::int64_t count) {
  const Problem one = products->sizes();
  // Turning what is copied costs as much as splitting it.
  const Division by{kPair,   kPair,  one.copied ? 60 : 50, one.b.column == 1 ? 50 : 60,
                    1 << 21, 1 << 28};
  const Grid grid = divide(one, by, std::max<std::int64_t>(1, pool.num_threads() / count));
  std::atomic<bool> odd{false};
  parallel(pool, count * grid.down * grid.across, [&](std::int64_t piece) {
    const std::int64_t down = piece / count / grid.across, across = piece / count % grid.across;
    if (!multiply_part(products[piece % count], part({0, one.rows}, down, grid.down, by.rows),
                       part({0, one.columns}, across, grid.across, by.columns)))
      odd.store(true, std::memory_order_relaxed);
  });
  return !odd.load(std::memory_order_relaxed);
}

// Small results of a great depth as the sums of their halves: then no thread copies what another
// does.
inline bool multiply_halves(xla::ffi::ThreadPool& pool, const Products& p) {
  thread_local std::vector<float> space;
  const Problem all = p.sizes();
  const std::int64_t half = all.depth / 2 / kDepth * kDepth;
  const std::size_t size = (all.rows + 1) * all.columns;
  if (space.size() < size) space.resize(size);
  float* other = space.data();
  Products halves[] = {p, p};
  for (std::size_t i = 0; i < p.parts.size(); ++i) {
    Problem &low = halves[0].parts[i], &high = halves[1].parts[i];
    low.depth = half;
    high.depth -= half;
    high.a.at += half * high.a.column;
    high.b.at += half * high.b.row;
    high.c = other;
    other += high.rows * high.columns;
    if (high.sums) high.sums = other;
    other += high.columns;
  }
  if (!multiply_all(pool, halves, 2)) return false;
  const auto add = [](float* to, const float* from, Range some) {
    each_vector(some.size(), [&](std::int64_t i, auto lanes) {
      i += some.start;
      lanes.store(to + i, lanes.load(to + i) + lanes.load(from + i));
    });
  };
  for (std::size_t i = 0; i < p.parts.size(); ++i) {
    const Problem &whole = p.parts[i], &high = halves[1].parts[i];
    const std::int64_t numbers = whole.rows * whole.columns, pieces = blocks(numbers, 1 << 16);
    parallel(pool, pieces, [&](std::int64_t piece) {
      add(whole.c, high.c, part({0, numbers}, piece, pieces, 1));
    });
    if (whole.sums) add(whole.sums, high.sums, {0, whole.columns});
  }
  return true;
}

// Return whether C was computed: if not, this process may not use tiles, or a number is not finite.
inline bool multiply(xla::ffi::ThreadPool& pool, const Products& p) {
  if (!tiles::allowed()) return false;
  // Side by side, a block of columns belongs to one of them.
  for (std::size_t i = 0; i + 1 < p.parts.size(); ++i)
    if (!p.summed && p.parts[i].columns % kPair) {
      for (const Problem& each : p.parts)
        if (!multiply(pool, {{each}})) return false;
      return true;
    }
  // By the shape alone, as the halves' sum has other bits.
  const Problem all = p.sizes();
  if (all.copied && all.depth >= kHalved && p.first().rows * p.first().columns <= kSmall)
    return multiply_halves(pool, p);
  return multiply_all(pool, &p, 1);
}

#else

struct Products {
  std::vector<Problem> parts;
  bool summed = false;
};

inline bool multiply(xla::ffi::ThreadPool&, const Products&) { return false; }

#endif

}  // namespace fnml::tiled
