// Products of images with panels of a kernel, read where the images lie: what convolutions share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "product.h"

namespace fnml {

inline constexpr int kWidest = kRegisters == 32 ? 4 : 2;     // vectors of features in registers
inline constexpr std::int64_t kFeatures = kWidest * kLanes;  // of one panel of a kernel

inline std::int64_t up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

// Memory that a thread keeps. It begins where a register's load does not cross a cache line.
class Scratch {
 public:
  float* take(std::int64_t size) {
    kept_.resize(std::max<std::size_t>(kept_.size(), size + 16));
    const auto past = reinterpret_cast<std::uintptr_t>(kept_.data()) / sizeof(float) % 16;
    return kept_.data() + (16 - past) % 16;
  }

 private:
  std::vector<float> kept_;
};

// The first `count` numbers of a row of vectors.
template <int Vectors>
inline void store_row(float* at, const Vec* row, std::int64_t count) {
  if (count == Vectors * kLanes) {
    for (int j = 0; j < Vectors; ++j) store(at + j * kLanes, row[j]);
  } else {
    std::memcpy(at, row, count * sizeof(float));
  }
}

// Up to kLanes numbers, the rest 0.
inline Vec load_some(const float* at, std::int64_t count) {
  if (count >= kLanes) return load(at);
  Vec x{};
  std::memcpy(&x, at, count * sizeof(float));
  return x;
}

// What one row (or column) of a result meets: neighbouring rows of the source, each with the row of
// the panel that is `step` after the one before.
struct Reach {
  std::int64_t source, slot, count;
};

// A product of images with panels, over all that each pixel of the result meets.
struct Gather {
  std::int64_t height, width, channels;  // of the source
  std::int64_t features;                 // of a row of the result
  std::int64_t window, step;             // columns of a panel's slots; how far apart they are met
  std::vector<Reach> rows, cols;
};

struct Pixel {
  std::int64_t from, to;
};

// Neighbouring numbers of the source, with the rows of the panel that they meet.
struct Run {
  std::int64_t from, row, depth;
};

// Pixels that meet the same part of the kernel.
struct Kind {
  std::vector<Run> runs;
  std::vector<Pixel> pixels;
};

inline bool alike(const Reach& a, const Reach& b) { return a.slot == b.slot && a.count == b.count; }

// The first reach of each kind.
inline std::vector<Reach> different(const std::vector<Reach>& reaches) {
  std::vector<Reach> found;
  for (const Reach& reach : reaches) {
    const auto same = [&](const Reach& other) { return alike(reach, other); };
    if (std::none_of(found.begin(), found.end(), same)) found.push_back(reach);
  }
  return found;
}

inline std::vector<Run> runs_of(const Gather& gather, const Reach& row, const Reach& col) {
  std::vector<Run> runs;
  const std::int64_t C = gather.channels;
  for (std::int64_t i = 0; i < row.count; ++i)
    for (std::int64_t j = 0; j < col.count; ++j) {
      const std::int64_t from = (i * gather.width + j) * C;
      const std::int64_t slot =
          (row.slot + i * gather.step) * gather.window + col.slot + j * gather.step;
      if (!runs.empty() && runs.back().from + runs.back().depth == from &&
          runs.back().row + runs.back().depth == slot * C)
        runs.back().depth += C;
      else
        runs.push_back({from, slot * C, C});
    }
  return runs;
}

// The kinds of pixels in lines [first, stop) of the result, counted over all images.
inline std::vector<Kind> kinds(const Gather& gather, std::int64_t first, std::int64_t stop) {
  const std::int64_t height = gather.rows.size(), width = gather.cols.size();
  std::vector<Kind> found;
  for (const Reach& row : different(gather.rows))
    for (const Reach& col : different(gather.cols)) {
      Kind kind{runs_of(gather, row, col), {}};
      for (std::int64_t line = first; line < stop; ++line) {
        const Reach& at = gather.rows[line % height];
        if (!alike(at, row)) continue;
        const std::int64_t start = (line / height * gather.height + at.source) * gather.width;
        for (std::int64_t j = 0; j < width; ++j)
          if (alike(gather.cols[j], col))
            kind.pixels.push_back({(start + gather.cols[j].source) * gather.channels,
                                   (line * width + j) * gather.features});
      }
      found.push_back(std::move(kind));
    }
  return found;
}

template <int Rows, int Vectors>
inline __attribute__((always_inline)) void gather_tile(const float* source, const Pixel* pixels,
                                                       const std::vector<Run>& runs,
                                                       const float* panel, float* out,
                                                       std::int64_t count) {
  Vec sums[Rows][Vectors] = {};
  for (const Run& run : runs) {
    const float* left[Rows];
    for (int i = 0; i < Rows; ++i) left[i] = source + pixels[i].from + run.from;
    const float* b = panel + run.row * Vectors * kLanes;
    for (std::int64_t k = 0; k < run.depth; ++k, b += Vectors * kLanes) {
      Vec right[Vectors];
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const float a = left[i][k];
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) sums[i][j] += a * right[j];
      }
    }
  }
  for (int i = 0; i < Rows; ++i) store_row<Vectors>(out + pixels[i].to, sums[i], count);
}

// Rows of a tile whose addresses, too, stay in registers.
constexpr int tile_rows(int vectors) { return std::min(8, rows_in_registers(vectors)); }

template <int Vectors, int Rows = tile_rows(Vectors)>
void gather_pixels(const float* source, const Pixel* pixels, std::int64_t many,
                   const std::vector<Run>& runs, const float* panel, float* out,
                   std::int64_t count) {
  std::int64_t i = 0;
  for (; i + Rows <= many; i += Rows)
    gather_tile<Rows, Vectors>(source, pixels + i, runs, panel, out, count);
  if constexpr (Rows > 1) {
    if (i < many)
      gather_pixels<Vectors, Rows / 2>(source, pixels + i, many - i, runs, panel, out, count);
  }
}

// Call work with the number of vectors, as a constant, that hold `count` numbers.
template <typename Work>
void with_vectors(std::int64_t count, const Work& work) {
  const std::int64_t vectors = (count + kLanes - 1) / kLanes;
  if (vectors == 1) return work(std::integral_constant<int, 1>());
  if constexpr (kWidest == 4) {
    if (vectors == 3) return work(std::integral_constant<int, 3>());
    if (vectors == 4) return work(std::integral_constant<int, 4>());
  }
  work(std::integral_constant<int, 2>());
}

// Compute `count` features of some pixels. A panel's rows are whole vectors.
inline void gather_kinds(const std::vector<Kind>& kinds, const float* source, const float* panel,
                         float* out, std::int64_t count) {
  with_vectors(count, [&](auto vectors) {
    for (const Kind& kind : kinds)
      gather_pixels<decltype(vectors)::value>(source, kind.pixels.data(), kind.pixels.size(),
                                              kind.runs, panel, out, count);
  });
}

// A pixel of a block of gradients, and where what it meets lies in the source.
struct Meeting {
  std::int64_t source, grad;
};

template <int Rows, int Vectors>
inline __attribute__((always_inline)) void meeting_tile(const float* source,
                                                        const std::vector<Meeting>& meetings,
                                                        const float* block, float* sum,
                                                        std::int64_t row) {
  Vec sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sums[i][j] = load(sum + i * row + j * kLanes);
  for (const Meeting& at : meetings) {
    Vec right[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) right[j] = load(block + at.grad + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float a = source[at.source + i];
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sums[i][j] += a * right[j];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) store(sum + i * row + j * kLanes, sums[i][j]);
}

template <int Vectors, int Rows = rows_in_registers(Vectors)>
void meeting_channels(const float* source, std::int64_t channels,
                      const std::vector<Meeting>& meetings, const float* block, float* sum,
                      std::int64_t row) {
  std::int64_t c = 0;
  for (; c + Rows <= channels; c += Rows)
    meeting_tile<Rows, Vectors>(source + c, meetings, block, sum + c * row, row);
  if constexpr (Rows > 1) {
    if (c < channels)
      meeting_channels<Vectors, Rows / 2>(source + c, channels - c, meetings, block, sum + c * row,
                                          row);
  }
}

// Add the products of all channels with `count` features, over some pixels, to rows of sums.
inline void gather_meetings(const float* source, std::int64_t channels,
                            const std::vector<Meeting>& meetings, const float* block,
                            std::int64_t count, float* sum, std::int64_t row) {
  with_vectors(count, [&](auto vectors) {
    meeting_channels<decltype(vectors)::value>(source, channels, meetings, block, sum, row);
  });
}

}  // namespace fnml
