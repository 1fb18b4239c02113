// Products of float32 matrices for the linear layer: x w + bias, grad w^T, x^T grad.
//
// Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication": operands are
// copied into panels that a tile of the result reads from end to end, in blocks that stay in a
// core's cache. An entry of C is one chain of sums in each block of the depth, and the blocks are
// added in order; they depend on the shapes alone. So how C is divided among threads does not
// change a bit of it.
#include <algorithm>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "product.h"

namespace fnml {
namespace {

constexpr int kVectors = 2;                         // of a panel of B
constexpr int kPanel = kVectors * kLanes;           // columns of it
constexpr int kRows = rows_in_registers(kVectors);  // of a tile of C
// Of blocks that are gone through at once.
constexpr std::int64_t kColumns = 512;      // of C
constexpr std::int64_t kHeight = 384;       // rows of C, where A is copied
constexpr std::int64_t kDepth = 512;        // where A is read as it lies
constexpr std::int64_t kCopiedDepth = 128;  // where A is copied
// Multiply-adds of a piece of work: it should outlast the start of a thread, and leave no thread
// idle for long at the end.
constexpr std::int64_t kLeastWork = 1 << 19;
constexpr std::int64_t kMostWork = 1 << 26;

// C = bias + A B, all in memory.
struct Problem {
  std::int64_t rows, columns, depth;
  Matrix a, b;
  const float* bias;  // [columns], or null
  float* c;           // [rows, columns]
  bool copied;        // whether A's columns are contiguous, so that it is copied; else its rows
  float* sums;        // [columns]: where A is copied, B summed over the depth; or null
};

struct Range {
  std::int64_t start, stop;
  std::int64_t size() const { return stop - start; }
};

std::int64_t blocks(std::int64_t size, std::int64_t most) { return (size + most - 1) / most; }

// The i-th of `parts` nearly equal parts, whose bounds are multiples of `unit`.
Range part(Range all, std::int64_t i, std::int64_t parts, std::int64_t unit) {
  const std::int64_t units = blocks(all.size(), unit);
  return {all.start + units * i / parts * unit,
          std::min(all.stop, all.start + units * (i + 1) / parts * unit)};
}

// Memory of this thread, aligned as vectors want it.
float* scratch(std::int64_t floats) {
  thread_local std::vector<Vec> space;
  const std::size_t vectors = blocks(floats, kLanes);
  if (space.size() < vectors) space.resize(vectors);
  return reinterpret_cast<float*>(space.data());
}

// Turn kLanes rows of kLanes floats into columns.
void turn(const float* from, std::int64_t row, float* to, std::int64_t to_row) {
  Vec square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * row);
  transpose(square);
  for (int i = 0; i < kLanes; ++i) store(to + i * to_row, square[i]);
}

// Copy columns of B, at most a panel, to [depth, width]; a column that is not there is 0.
void copy_panel(const Problem& p, Range depth, Range columns, float* to) {
  const std::int64_t width = blocks(columns.size(), kLanes) * kLanes;
  const float* from = p.b.at + depth.start * p.b.row + columns.start * p.b.column;
  std::int64_t k = 0;
  if (p.b.row == 1 && columns.size() == width)
    for (; k + kLanes <= depth.size(); k += kLanes)
      for (std::int64_t n = 0; n < width; n += kLanes)
        turn(from + k + n * p.b.column, p.b.column, to + k * width + n, width);
  for (; k < depth.size(); ++k) {
    const float* row = from + k * p.b.row;
    if (p.b.column == 1 && columns.size() == kPanel)
      std::memcpy(to + k * width, row, kPanel * sizeof(float));
    else
      for (std::int64_t n = 0; n < width; ++n)
        to[k * width + n] = n < columns.size() ? row[n * p.b.column] : 0.0f;
  }
}

// Copy rows of A, whose columns are contiguous, to tiles [depth, kRows] that lie `apart`.
void copy_tiles(const Problem& p, Range rows, Range depth, float* to, std::int64_t apart) {
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
void add_up(Range depth, Range columns, const float* b, float* sums) {
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
void tile_of_c(const Problem& p, Range rows, Range columns, Range depth, Matrix a, const float* b) {
  float* c = p.c + rows.start * p.columns + columns.start;
  const Target to = depth.start ? Target{c, p.columns, c, p.columns}
                    : p.bias    ? Target{c, p.columns, p.bias + columns.start, 0}
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

// Call work(part) for parts of a range that are `size` long, but for the last one.
template <typename Work>
inline void each(Range all, std::int64_t size, const Work& work) {
  for (std::int64_t i = all.start; i < all.stop; i += size)
    work(Range{i, std::min(i + size, all.stop)});
}

// A block of B stays in the cache, and rows of A, which are contiguous, pass over it.
void multiply_rows(const Problem& p, Range rows, Range columns) {
  const std::int64_t parts = blocks(p.depth, kDepth);
  float* b = scratch((kColumns + kPanel) * kDepth);
  for (std::int64_t kc = 0; kc < parts; ++kc) {
    const Range depth = part({0, p.depth}, kc, parts, 1);
    const auto panel = [&](Range some) { return b + (some.start - columns.start) * depth.size(); };
    each(columns, kPanel, [&](Range some) { copy_panel(p, depth, some, panel(some)); });
    each(rows, kRows, [&](Range tile) {
      const Matrix a{p.a.at + tile.start * p.a.row + depth.start, p.a.row, 1};
      each(columns, kPanel, [&](Range some) { tile_of_c(p, tile, some, depth, a, panel(some)); });
    });
  }
}

// A block of C and of A, whose columns are contiguous, stays in the cache; panels of B pass.
void multiply_columns(const Problem& p, Range rows, Range columns) {
  const std::int64_t parts = blocks(p.depth, kCopiedDepth), tiles = blocks(rows.size(), kRows);
  // Apart by a little more than a tile's size, so that tiles do not meet in few sets of the cache.
  constexpr std::int64_t most_apart = kCopiedDepth * kRows + kLanes;
  float* b = scratch(kPanel * kCopiedDepth + blocks(kHeight, kRows) * most_apart);
  float* left = b + kPanel * kCopiedDepth;
  for (std::int64_t kc = 0; kc < parts; ++kc) {
    const Range depth = part({0, p.depth}, kc, parts, 1);
    const std::int64_t apart = depth.size() * kRows + kLanes;
    copy_tiles(p, rows, depth, left, apart);
    each(columns, kPanel, [&](Range some) {
      copy_panel(p, depth, some, b);
      if (p.sums && rows.start == 0) add_up(depth, some, b, p.sums + some.start);
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::int64_t start = rows.start + i * kRows;
        tile_of_c(p, {start, std::min(start + kRows, rows.stop)}, some, depth,
                  {left + i * apart, 1, kRows}, b);
      }
    });
  }
}

void multiply_part(const Problem& p, Range rows, Range columns) {
  const std::int64_t down = p.copied ? blocks(rows.size(), kHeight) : 1;
  const std::int64_t across = blocks(columns.size(), kColumns);
  for (std::int64_t j = 0; j < across; ++j)
    for (std::int64_t i = 0; i < down; ++i)
      (p.copied ? multiply_columns : multiply_rows)(p, part(rows, i, down, 4),
                                                    part(columns, j, across, kLanes));
}

// How C is divided: the parts of its rows and of its columns.
struct Grid {
  std::int64_t down, across;
};

Grid divide(const Problem& p, std::int64_t threads) {
  const std::int64_t work = p.rows * p.columns * p.depth;
  const std::int64_t rounds = std::clamp<std::int64_t>(work / (threads * kMostWork), 1, 4);
  const std::int64_t pieces = std::min(threads * rounds, 1 + work / kLeastWork);
  const std::int64_t most_down = blocks(p.rows, 4), most_across = blocks(p.columns, kLanes);
  // What copying a row of A or a column of B costs, in multiply-adds of one entry of C.
  const std::int64_t a_cost = p.copied ? 5 : 3, b_cost = p.b.column == 1 ? 3 : 12;
  Grid best{1, 1};
  std::int64_t least = -1;
  for (std::int64_t across = 1; across <= std::min(pieces, most_across); ++across) {
    const std::int64_t down = std::min(pieces / across, most_down);
    const std::int64_t rows = blocks(most_down, down) * 4;
    const std::int64_t columns = blocks(most_across, across) * kLanes;
    const std::int64_t cost = rows * columns + rows * a_cost + columns * b_cost;
    if (least < 0 || cost < least) best = {down, across}, least = cost;
  }
  return best;
}

ffi::Error multiply(ffi::ThreadPool& pool, const Problem& p) {
  const Grid grid = divide(p, std::max<std::int64_t>(1, pool.num_threads()));
  parallel(pool, grid.down * grid.across, [&](std::int64_t piece) {
    multiply_part(p, part({0, p.rows}, piece / grid.across, grid.down, 4),
                  part({0, p.columns}, piece % grid.across, grid.across, kLanes));
  });
  return ffi::Error::Success();
}

// y [N, F] = x [N, D] w [D, F] + bias, which may have no numbers.
ffi::Error Forward(ffi::ThreadPool pool, Floats<2> x, Floats<2> w, Floats<1> bias,
                   ffi::Result<Floats<2>> y) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1], F = w.dimensions()[1];
  return multiply(pool, {N,
                         F,
                         D,
                         {x.typed_data(), D, 1},
                         {w.typed_data(), F, 1},
                         bias.element_count() ? bias.typed_data() : nullptr,
                         y->typed_data(),
                         false,
                         nullptr});
}

// grad_x [N, D] = grad [N, F] w^T
ffi::Error InputGradient(ffi::ThreadPool pool, Floats<2> w, Floats<2> grad,
                         ffi::Result<Floats<2>> grad_x) {
  const std::int64_t N = grad.dimensions()[0], D = w.dimensions()[0], F = w.dimensions()[1];
  return multiply(pool, {N,
                         D,
                         F,
                         {grad.typed_data(), F, 1},
                         {w.typed_data(), 1, F},
                         nullptr,
                         grad_x->typed_data(),
                         false,
                         nullptr});
}

// grad_w [D, F] = x^T grad, and grad_bias = the sum of grad's rows, unless it has no numbers.
ffi::Error KernelGradient(ffi::ThreadPool pool, Floats<2> x, Floats<2> grad,
                          ffi::Result<Floats<2>> grad_w, ffi::Result<Floats<1>> grad_bias) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1], F = grad.dimensions()[1];
  return multiply(pool, {D,
                         F,
                         N,
                         {x.typed_data(), 1, D},
                         {grad.typed_data(), F, 1},
                         nullptr,
                         grad_w->typed_data(),
                         true,
                         grad_bias->element_count() ? grad_bias->typed_data() : nullptr});
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_input_gradient, fnml::InputGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_linear_kernel_gradient, fnml::KernelGradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<1>>());
