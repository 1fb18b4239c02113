// Winograd's F(4, 3) along the rows: four neighbouring outputs of a filter of three from six
// products instead of twelve. Lavin and Gray 2016, arXiv:1509.09308, section 4.3.
//
// A strip is what gives four rows of a result: six rows of the source, mixed.
#pragma once

#include "gather.h"

namespace fnml {

inline constexpr int kTaps = 6;   // rows of a strip
inline constexpr int kStrip = 4;  // rows of its result

// Strips whose products run together. Six of them are whole tiles, at the edges too.
inline std::int64_t strips_together(std::int64_t width) {
  return 6 * std::max<std::int64_t>(1, 16 / width);
}

// Six rows of the source, mixed.
inline void mix_source(const Vec* x, Vec* out) {
  const Vec a = x[4] - 4.0f * x[2], b = x[3] - 4.0f * x[1];
  const Vec c = x[4] - x[2], d = 2.0f * (x[3] - x[1]);
  out[0] = 4.0f * x[0] - 5.0f * x[2] + x[4];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + d;
  out[4] = c - d;
  out[5] = 4.0f * x[1] - 5.0f * x[3] + x[5];
}

// Three rows of a kernel, mixed.
inline void mix_kernel(const Vec* k, Vec* out) {
  const Vec a = (k[0] + k[2]) * (-1.0f / 6), b = k[1] * (1.0f / 6);
  const Vec c = k[0] * (1.0f / 24) + k[2] * (1.0f / 6), d = k[1] * (1.0f / 12);
  out[0] = 0.25f * k[0];
  out[1] = a - b;
  out[2] = a + b;
  out[3] = c + d;
  out[4] = c - d;
  out[5] = k[2];
}

// The four rows of a result from six products.
inline void mix_result(const Vec* m, Vec* out) {
  const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[1] = b + 2.0f * d;
  out[2] = a + 4.0f * c;
  out[3] = b + 8.0f * d + m[5];
}

// Four rows of a result's gradient, mixed: the transpose of mix_result.
inline void mix_result_back(const Vec* g, Vec* out) {
  const Vec a = g[0] + g[2], b = g[1] + g[3];
  const Vec c = g[0] + 4.0f * g[2], d = 2.0f * g[1] + 8.0f * g[3];
  out[0] = g[0];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + d;
  out[4] = c - d;
  out[5] = g[3];
}

// The three rows of a kernel's gradient: the transpose of mix_kernel.
inline void mix_kernel_back(const Vec* p, Vec* out) {
  const Vec a = (p[1] + p[2]) * (-1.0f / 6), b = (p[2] - p[1]) * (1.0f / 6);
  const Vec c = p[3] + p[4], d = (p[3] - p[4]) * (1.0f / 12);
  out[0] = 0.25f * p[0] + a + c * (1.0f / 24);
  out[1] = b + d;
  out[2] = a + c * (1.0f / 6) + p[5];
}

// Six mixed rows from the rows of `source` that begin at `first`, which may lie outside.
inline void mix_rows(const float* source, std::int64_t first, std::int64_t height, std::int64_t row,
                     float* out, std::int64_t apart) {
  for (std::int64_t n = 0; n < row; n += kLanes) {
    const std::int64_t count = std::min<std::int64_t>(kLanes, row - n);
    Vec x[kTaps], mixed[kTaps];
    for (int i = 0; i < kTaps; ++i) {
      const bool inside = first + i >= 0 && first + i < height;
      x[i] = inside ? load_some(source + (first + i) * row + n, count) : Vec{};
    }
    mix_source(x, mixed);
    for (int i = 0; i < kTaps; ++i) store_row<1>(out + i * apart + n, &mixed[i], count);
  }
}

// The work of the result's strips, [first, stop) of all images, for `count` features.
//
// `top` is how far before its own row a row of the result begins to see; `panel` holds the kernel's
// three rows, [3, columns, channels, whole vectors of features].
inline void winograd_strips(const Gather& line, std::int64_t height, std::int64_t rows,
                            std::int64_t top, std::int64_t first, std::int64_t stop,
                            std::int64_t together, const float* panel, const float* source,
                            float* out, std::int64_t features, std::int64_t count) {
  thread_local Scratch scratch;
  const std::int64_t width = line.cols.size(), wide = line.features;
  const std::int64_t row = line.width * line.channels, depth = line.window * line.channels * wide;
  const std::int64_t mixed = together * row, products = together * width * wide;
  float* taps = scratch.take(kTaps * (depth + up(mixed, 16) + products));
  float* from = taps + kTaps * depth;
  float* to = from + kTaps * up(mixed, 16);
  for (std::int64_t n = 0; n < depth; n += kLanes) {
    Vec k[3], u[kTaps];
    for (int i = 0; i < 3; ++i) k[i] = load(panel + i * depth + n);
    mix_kernel(k, u);
    for (int i = 0; i < kTaps; ++i) store(taps + i * depth + n, u[i]);
  }
  const std::int64_t strips = (rows + kStrip - 1) / kStrip;
  std::vector<Kind> met;
  for (std::int64_t start = first; start < stop; start += together) {
    const std::int64_t many = std::min(together, stop - start);
    if (start == first || many < together) met = kinds(line, 0, many);
    for (std::int64_t n = 0; n < many; ++n) {
      const std::int64_t image = (start + n) / strips, strip = (start + n) % strips;
      mix_rows(source + image * height * row, strip * kStrip - top, height, row, from + n * row,
               up(mixed, 16));
    }
    for (int k = 0; k < kTaps; ++k)
      gather_kinds(met, from + k * up(mixed, 16), taps + k * depth, to + k * products, wide);
    for (std::int64_t n = 0; n < many; ++n) {
      const std::int64_t image = (start + n) / strips, i = (start + n) % strips * kStrip;
      const std::int64_t there = std::min<std::int64_t>(kStrip, rows - i);
      for (std::int64_t j = 0; j < width; ++j)
        for (std::int64_t f = 0; f < wide; f += kLanes) {
          Vec m[kTaps], y[kStrip];
          for (int k = 0; k < kTaps; ++k)
            m[k] = load(to + k * products + (n * width + j) * wide + f);
          mix_result(m, y);
          for (std::int64_t r = 0; r < there; ++r)
            store_row<1>(out + ((image * rows + i + r) * width + j) * features + f, &y[r],
                         std::min<std::int64_t>(kLanes, count - f));
        }
    }
  }
}

}  // namespace fnml
