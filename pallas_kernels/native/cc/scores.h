// Attention's scores: which keys a query sees, the softmax over them, and its derivative.
//
// Scores are kept transposed, keys by queries: the softmax over keys is arithmetic on whole vectors
// of queries. Dao 2023, arXiv:2307.08691.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace fnml {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

inline std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Shape {
  std::int64_t B, T, S, H, K, D;
  std::int64_t left, right;  // how far a query sees, or a negative number for no bound
  float scale;

  std::int64_t first_key(std::int64_t query) const {
    return left < 0 ? 0 : std::max<std::int64_t>(0, query - left);
  }
  std::int64_t stop_key(std::int64_t query) const {
    return right < 0 ? S : std::min(S, query + right + 1);
  }
};

// Arithmetic on the scores of kQueries queries.
template <int kQueries>
struct Scores {
  static constexpr int kVectors = kQueries / kLanes;

  // Queries [start, start + kQueries) of one head, and the keys that any of them sees.
  struct Rows {
    std::int64_t start, count, first, stop;

    Rows(const Shape& shape, std::int64_t start)
        : start(start),
          count(std::min<std::int64_t>(kQueries, shape.T - start)),
          first(shape.first_key(start)),
          stop(std::max(first, shape.stop_key(start + count - 1))) {}
  };

  // Turn [count, D] rows into [D, kQueries], times a factor; missing rows are 0.
  static void turn(const float* x, std::int64_t row, std::int64_t count, std::int64_t D,
                   float factor, float* out) {
    for (std::int64_t i = 0; i < kQueries; i += kLanes)
      for (std::int64_t d = 0; d < D; d += kLanes) {
        Vec square[kLanes];
        for (int n = 0; n < kLanes; ++n)
          square[n] = i + n < count ? load(x + (i + n) * row + d) * factor : Vec{};
        transpose(square);
        for (int n = 0; n < kLanes; ++n) store(out + (d + n) * kQueries + i, square[n]);
      }
  }

  // Replace scores of keys that a query does not see by -inf.
  static void hide(const Shape& shape, const Rows& rows, std::int64_t key, std::int64_t keys,
                   float* scores) {
    const bool right = shape.right >= 0 && key + keys > shape.stop_key(rows.start);
    const bool left = shape.left >= 0 && key < shape.first_key(rows.start + rows.count - 1);
    if (!left && !right) return;
    for (std::int64_t j = 0; j < keys; ++j)
      for (int n = 0; n < kVectors; ++n) {
        const Ints ahead = iota() + static_cast<std::int32_t>(rows.start + n * kLanes - key - j);
        Vec x = load(scores + j * kQueries + n * kLanes);
        if (shape.right >= 0)
          x = ahead < static_cast<std::int32_t>(-shape.right) ? splat(-kInfinity) : x;
        if (shape.left >= 0)
          x = ahead > static_cast<std::int32_t>(shape.left) ? splat(-kInfinity) : x;
        store(scores + j * kQueries + n * kLanes, x);
      }
  }

  // The softmax of scores, in units of log(2), that come some keys at a time.
  struct Softmax {
    Vec top[kVectors], total[kVectors];
    alignas(64) float shrink[kQueries];  // what sums of the weights so far are to be multiplied by

    Softmax() {
      for (int n = 0; n < kVectors; ++n) top[n] = splat(-kInfinity), total[n] = Vec{};
    }

    // Replace scores by weights.
    void weigh(std::int64_t keys, float* scores) {
      for (int n = 0; n < kVectors; ++n) {
        Vec now = top[n];
        for (std::int64_t j = 0; j < keys; ++j)
          now = max(load(scores + j * kQueries + n * kLanes), now);
        const Vec level = now == -kInfinity ? Vec{} : now;
        Vec sum{};
        for (std::int64_t j = 0; j < keys; ++j) {
          float* at = scores + j * kQueries + n * kLanes;
          const Vec weight = exp2(load(at) - level);
          store(at, weight);
          sum += weight;
        }
        const Vec factor = exp2(top[n] - level);
        store(shrink + n * kLanes, factor);
        total[n] = total[n] * factor + sum;
        top[n] = now;
      }
    }

    // A query that sees nothing.
    bool alone(std::int64_t i) const { return total[i / kLanes][i % kLanes] == 0.0f; }
    // What its sum of weighted values is to be multiplied by.
    float share(std::int64_t i) const {
      return alone(i) ? 0.0f : 1.0f / total[i / kLanes][i % kLanes];
    }
    float log(std::int64_t i) const {
      return alone(i)
                 ? kInfinity
                 : top[i / kLanes][i % kLanes] / kLog2E + std::log(total[i / kLanes][i % kLanes]);
    }
  };

  // The softmax once more, from the logs of its sums, and its derivative.
  struct Slopes {
    alignas(64) float level[kQueries], inner[kQueries];

    Slopes() = default;
    Slopes(const Rows& rows, std::int64_t row, std::int64_t D, const float* log, const float* out,
           const float* grad) {
      begin(rows, row, D, log, out, grad);
    }

    void begin(const Rows& rows, std::int64_t row, std::int64_t D, const float* log,
               const float* out, const float* grad) {
      for (std::int64_t i = 0; i < kQueries; i += kLanes) {
        Vec dots[kLanes];
        for (int n = 0; n < kLanes; ++n) {
          // A row that is not there has no weights: its level is infinite.
          level[i + n] = i + n < rows.count ? log[i + n] * kLog2E : kInfinity;
          dots[n] = Vec{};
          if (i + n < rows.count)
            for (std::int64_t d = 0; d < D; d += kLanes)
              dots[n] += load(out + (i + n) * row + d) * load(grad + (i + n) * row + d);
        }
        transpose(dots);
        for (int n = 1; n < kLanes; ++n) dots[0] += dots[n];
        store(inner + i, dots[0]);
      }
    }

    // Replace scores by weights, and the weights' gradients by those of the products q k.
    void weigh(std::int64_t keys, float scale, float* scores, float* slopes) const {
      for (int n = 0; n < kVectors; ++n) {
        const Vec down = load(level + n * kLanes), own = load(inner + n * kLanes);
        for (std::int64_t j = 0; j < keys; ++j) {
          const std::int64_t x = j * kQueries + n * kLanes;
          const Vec weight = exp2(load(scores + x) - down);
          store(scores + x, weight);
          store(slopes + x, weight * (load(slopes + x) - own) * scale);
        }
      }
    }
  };
};

// Heads of keys that one piece of work takes, one after the other: where there are many, and the
// next one's rows can come into the cache while one is worked on. It changes no bit.
inline std::int64_t heads_of_a_piece(const Shape& shape, std::int64_t threads) {
  constexpr std::int64_t pieces = 8, most = 4;  // pieces of each thread, so that they end together
  constexpr std::int64_t short_rows = 1 << 16;  // numbers of a head's queries and keys
  if ((shape.T + shape.S) * shape.D > short_rows) return 1;
  return std::clamp<std::int64_t>(shape.B * shape.K / (pieces * threads), 1, most);
}

// Share the backward pass out: call work(b, n, part, parts, to_k, to_v, to_row, more) for each
// batch, each of its heads of keys, and parts of the `tiles` of queries, to write gradients of keys
// and values to to_k and to_v. Those of the parts are added up, in order. `more`: whether the same
// thread takes the next head thereafter.
template <typename Work>
void backward_parts(xla::ffi::ThreadPool& pool, const Shape& shape, std::int64_t tiles,
                    float* grad_k, float* grad_v, const Work& work) {
  constexpr std::int64_t pieces = 8;  // at least so many, if there are tiles enough
  const std::int64_t B = shape.B, S = shape.S, K = shape.K, D = shape.D;
  // Heads are shared out in parts where they are few. How many parts depends on the shape alone.
  const std::int64_t parts =
      std::min(tiles, std::max<std::int64_t>(1, pieces / std::max<std::int64_t>(1, B * K)));
  const std::int64_t part_size = S * D;
  std::vector<float> partial(2 * B * K * (parts - 1) * part_size);
  const std::int64_t run = heads_of_a_piece(shape, std::max<std::int64_t>(1, pool.num_threads()));
  parallel(pool, up(B * K, run) * parts, [&](std::int64_t piece) {
    const std::int64_t part = piece % parts, start = piece / parts * run,
                       stop = std::min(B * K, start + run);
    for (std::int64_t i = start; i < stop; ++i) {
      const std::int64_t n = i % K, b = i / K, key = (b * S * K + n) * D;
      const bool more = i + 1 < stop;
      // The first part writes the results, the others arrays of their own.
      float* to = partial.data() + 2 * (i * (parts - 1) + part - 1) * part_size;
      if (part == 0)
        work(b, n, part, parts, grad_k + key, grad_v + key, K * D, more);
      else
        work(b, n, part, parts, to, to + part_size, D, more);
    }
  });
  if (parts == 1) return;
  parallel(pool, B * K, [&](std::int64_t piece) {
    const std::int64_t n = piece % K, b = piece / K;
    for (std::int64_t part = 1; part < parts; ++part) {
      const float* from = partial.data() + 2 * (piece * (parts - 1) + part - 1) * part_size;
      for (std::int64_t s = 0; s < S; ++s)
        for (std::int64_t d = 0; d < D; d += kLanes) {
          float* to_k = grad_k + ((b * S + s) * K + n) * D + d;
          float* to_v = grad_v + ((b * S + s) * K + n) * D + d;
          store(to_k, load(to_k) + load(from + s * D + d));
          store(to_v, load(to_v) + load(from + part_size + s * D + d));
        }
    }
  });
}

}  // namespace fnml
