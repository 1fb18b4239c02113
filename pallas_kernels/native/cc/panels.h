// Products of matrices on vectors: C = bias + A B.
//
// Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication": operands are
// copied into panels that a tile of the result reads from end to end, in blocks that stay in a
// core's cache. An entry of C is one chain of sums in each block of the depth, and the blocks are
// added in order; they depend on the shapes alone. So how C is divided among threads does not
// change a bit of it.
#pragma once

#include "matrices.h"
#include "parallel.h"

namespace fnml::panels {

constexpr int kVectors = 2;                         // of a panel of B
constexpr int kPanel = kVectors * kLanes;           // columns of it
constexpr int kRows = rows_in_registers(kVectors);  // of a tile of C
// Of blocks that are gone through at once.
constexpr std::int64_t kColumns = 512;      // of C
constexpr std::int64_t kHeight = 384;       // rows of C, where A is copied
constexpr std::int64_t kDepth = 512;        // where A is read as it lies
constexpr std::int64_t kCopiedDepth = 128;  // where A is copied

// Rows that lie this far apart, or a multiple of it, meet in few sets of the first cache.
constexpr std::int64_t kMeeting = 1024;

// Turn kLanes rows of kLanes floats into columns.
inline void turn(const float* from, std::int64_t row, float* to, std::int64_t to_row) {
  Vec square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * row);
  transpose(square);
  for (int i = 0; i < kLanes; ++i) store(to + i * to_row, square[i]);
}

// Copy columns of B, at most a panel, to [depth, width]; a column that is not there is 0.
inline void copy_panel(const Problem& p, Range depth, Range columns, float* to) {
  const std::int64_t width = blocks(columns.size(), kLanes) * kLanes;
  const float* from = p.b.at + depth.start * p.b.row + columns.start * p.b.column;
  std::int64_t k = 0;
  if (p.b.row == 1 && columns.size() == width)
    for (; k + kLanes <= depth.size(); k += kLanes)
      for (std::int64_t n = 0; n < width; n += kLanes)
        turn(from + k + n * p.b.column, p.b.column, to + k * width + n, width);
  // A vector may reach beyond a row's end, into the next one.
  const std::int64_t beyond = columns.start + width - p.columns;
  const bool rows = p.b.column == 1;
  for (; rows && k < depth.size() && (p.depth - 1 - depth.start - k) * p.b.row >= beyond; ++k)
    for (std::int64_t n = 0; n < width; n += kLanes)
      store(to + k * width + n, load(from + k * p.b.row + n));
  for (; k < depth.size(); ++k)
    for (std::int64_t n = 0; n < width; ++n)
      to[k * width + n] = n < columns.size() ? from[k * p.b.row + n * p.b.column] : 0.0f;
}

// Copy rows of A, whose columns are contiguous, to tiles [depth, kRows] that lie `apart`.
inline void copy_tiles(const Problem& p, Range rows, Range depth, float* to, std::int64_t apart) {
  // Along A's memory: down its columns every step would be another page.
  for (std::int64_t k = 0; k < depth.size(); ++k) {
    const float* from = p.a.at + rows.start + (depth.start + k) * p.a.column;
    float* tile = to + k * kRows;
    std::int64_t i = 0;
    for (; i + kRows <= rows.size(); i += kRows, tile += apart)
      std::memcpy(tile, from + i, kRows * sizeof(float));
    std::memcpy(tile, from + i, (rows.size() - i) * sizeof(float));
  }
}

// Add the rows of a copied panel to sums, or begin them.
inline void add_up(Range depth, Range columns, const float* b, float* sums) {
  const std::int64_t width = blocks(columns.size(), kLanes) * kLanes;
  for (std::int64_t n = 0; n < columns.size(); n += kLanes) {
    Vec total{};
    for (std::int64_t k = 0; k < depth.size(); ++k) total += load(b + k * width + n);
    for (std::int64_t i = n; i < std::min(n + kLanes, columns.size()); ++i)
      sums[i] = depth.start ? sums[i] + total[i - n] : total[i - n];
  }
}

// Where a result is written, and what is added to it; `start` is null for nothing.
struct Target {
  float* c;
  std::int64_t row;
  const float* start;
  std::int64_t start_row;

  Target below(std::int64_t rows) const {
    return {c + rows * row, row, start ? start + rows * start_row : nullptr, start_row};
  }
};

template <int Rows, int Vectors>
inline __attribute__((always_inline)) void panel_tile(std::int64_t depth, Matrix a, const float* b,
                                                      Target to) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) __builtin_prefetch(to.c + i * to.row + j * kLanes, 1);
  Vec sums[Rows][Vectors] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec right[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + (k * Vectors + j) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float left = a.at[i * a.row + k * a.column];
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      Vec& sum = sums[i][j];
      if (to.start) sum = load(to.start + i * to.start_row + j * kLanes) + sum;
      store(to.c + i * to.row + j * kLanes, sum);
    }
}

// A tile of at most kRows rows.
template <int Vectors, int Rows = kRows>
void panel_rows(std::int64_t rows, std::int64_t depth, Matrix a, const float* b, Target to) {
  if (rows >= Rows) {
    panel_tile<Rows, Vectors>(depth, a, b, to);
    rows -= Rows, a.at += Rows * a.row, to = to.below(Rows);
  }
  constexpr int next = Rows > 8 ? 8 : Rows > 4 ? 4 : Rows / 2;
  if constexpr (next > 0)
    if (rows > 0) panel_rows<Vectors, next>(rows, depth, a, b, to);
}

// The tile of C at some rows and the columns of a panel.
inline void tile_of_c(const Problem& p, Range rows, Range columns, Range depth, Matrix a,
                      const float* b) {
  float* c = p.c + rows.start * p.columns + columns.start;
  const Target to = depth.start || p.adds ? Target{c, p.columns, c, p.columns}
                    : p.bias              ? Target{c, p.columns, p.bias + columns.start, 0}
                                          : Target{c, p.columns, nullptr, 0};
  if (columns.size() == kPanel) return panel_rows<kVectors>(rows.size(), depth.size(), a, b, to);
  if (columns.size() == kLanes) return panel_rows<1>(rows.size(), depth.size(), a, b, to);
  // Vectors that reach beyond the row's end are taken elsewhere, and their part copied.
  alignas(64) float sums[kRows * kPanel];
  const std::int64_t width = blocks(columns.size(), kLanes) * kLanes;
  const Target aside{sums, width, nullptr, 0};
  if (width == kLanes)
    panel_rows<1>(rows.size(), depth.size(), a, b, aside);
  else
    panel_rows<kVectors>(rows.size(), depth.size(), a, b, aside);
  for (std::int64_t i = 0; i < rows.size(); ++i)
    for (std::int64_t j = 0; j < columns.size(); ++j) {
      const float sum = sums[i * width + j];
      to.c[i * to.row + j] = to.start ? to.start[i * to.start_row + j] + sum : sum;
    }
}

// Copy rows of A to where they do not meet.
inline Matrix lay_apart(Matrix a, std::int64_t rows, std::int64_t depth, float* to) {
  const std::int64_t row = depth + kLanes;
  for (std::int64_t i = 0; i < rows; ++i)
    std::memcpy(to + i * row, a.at + i * a.row, depth * sizeof(float));
  return {to, row, 1};
}

// A block of B stays in the cache, and rows of A, which are contiguous, pass over it.
inline void multiply_rows(const Problem& p, Range rows, Range columns) {
  const std::int64_t parts = blocks(p.depth, kDepth);
  constexpr std::int64_t most_b = (kColumns + kPanel) * kDepth;
  float* b = scratch(most_b + kRows * (kDepth + kLanes));
  float* left = b + most_b;
  const bool meeting = p.a.row % kMeeting == 0 && columns.size() > kPanel;
  for (std::int64_t kc = 0; kc < parts; ++kc) {
    const Range depth = part({0, p.depth}, kc, parts, 1);
    const auto panel = [&](Range some) { return b + (some.start - columns.start) * depth.size(); };
    each(columns, kPanel, [&](Range some) { copy_panel(p, depth, some, panel(some)); });
    each(rows, kRows, [&](Range tile) {
      Matrix a{p.a.at + tile.start * p.a.row + depth.start, p.a.row, 1};
      if (meeting) a = lay_apart(a, tile.size(), depth.size(), left);
      each(columns, kPanel, [&](Range some) { tile_of_c(p, tile, some, depth, a, panel(some)); });
    });
  }
}

// A block of C and of A, whose columns are contiguous, stays in the cache; panels of B pass.
inline void multiply_columns(const Problem& p, Range rows, Range columns) {
  const std::int64_t parts = blocks(p.depth, kCopiedDepth), tiles = blocks(rows.size(), kRows);
  // Apart by a little more than a tile's size, so that tiles do not meet in few sets of the cache.
  constexpr std::int64_t most_apart = kCopiedDepth * kRows + kLanes;
  float* b = scratch(kPanel * kCopiedDepth + blocks(kHeight, kRows) * most_apart);
  float* left = b + kPanel * kCopiedDepth;
  const bool once = columns.size() <= kPanel;  // then A is read once, where it lies
  for (std::int64_t kc = 0; kc < parts; ++kc) {
    const Range depth = part({0, p.depth}, kc, parts, 1);
    const std::int64_t apart = depth.size() * kRows + kLanes;
    if (!once) copy_tiles(p, rows, depth, left, apart);
    each(columns, kPanel, [&](Range some) {
      copy_panel(p, depth, some, b);
      if (p.sums && rows.start == 0) add_up(depth, some, b, p.sums + some.start);
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::int64_t start = rows.start + i * kRows;
        const Matrix a = once ? Matrix{p.a.at + start + depth.start * p.a.column, 1, p.a.column}
                              : Matrix{left + i * apart, 1, kRows};
        tile_of_c(p, {start, std::min(start + kRows, rows.stop)}, some, depth, a, b);
      }
    });
  }
}

inline void multiply_part(const Problem& p, Range rows, Range columns) {
  const std::int64_t down = p.copied ? blocks(rows.size(), kHeight) : 1;
  const std::int64_t across = blocks(columns.size(), kColumns);
  for (std::int64_t j = 0; j < across; ++j)
    for (std::int64_t i = 0; i < down; ++i)
      (p.copied ? multiply_columns : multiply_rows)(p, part(rows, i, down, 4),
                                                    part(columns, j, across, kLanes));
}

inline void multiply(xla::ffi::ThreadPool& pool, const Problem& p) {
  const Division by{4, kLanes, p.copied ? 5 : 3, p.b.column == 1 ? 3 : 12, 1 << 19, 1 << 26};
  const Grid grid = divide(p, by, std::max<std::int64_t>(1, pool.num_threads()));
  parallel(pool, grid.down * grid.across, [&](std::int64_t piece) {
    multiply_part(p, part({0, p.rows}, piece / grid.across, grid.down, by.rows),
                  part({0, p.columns}, piece % grid.across, grid.across, by.columns));
  });
}

}  // namespace fnml::panels
