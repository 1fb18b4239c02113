// Packed operands of products on matrix tiles that are used more than once, and their products.
#pragma once

#include "matrices.h"
#include "tiles.h"

#if FNML_TILES

namespace fnml::tiled {

using tiles::Cut;
using tiles::cut;
using tiles::join;
using tiles::kBlock;
using tiles::kDepth;
using tiles::kSide;

// A packed operand: panels of kSide rows or columns, `apart` words from one to the next.
struct Panels {
  float* at;
  std::int64_t apart;

  Panels from(std::int64_t row) const { return {at + row / kSide * apart, apart}; }
  // From some depth on, a multiple of kDepth.
  Panels below(std::int64_t depth) const { return {at + depth / kDepth * kBlock, apart}; }
};

inline std::int64_t whole(std::int64_t depth) { return blocks(depth, kDepth) * kDepth; }

// `count` rows of kSide numbers; missing ones are 0.
struct Square {
  const float* at;
  std::int64_t count;

  template <bool Turned>
  void read(std::int64_t row, float factor, Vec (&to)[kSide]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) to[i] = i < count ? load(at + i * row) * factor : Vec{};
    if (Turned) transpose(to);
  }
};

// Write one panel at one depth: words pair the numbers of two squares, or of their columns.
template <bool Turned>
inline void pack_squares(Square low, Square high, std::int64_t row, float factor, float* to,
                         Vec& odd) {
  Vec below[kSide], above[kSide];
  low.read<Turned>(row, factor, below);
  high.read<Turned>(row, factor, above);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) join(cut(below[i], odd), cut(above[i], odd), to + i * kSide);
}

// Pack rows of D numbers, a multiple of kSide, times a factor: each as a row of a left operand or,
// turned, as a column of a right one. Rows from `count` to `all` are 0.
template <bool Turned>
void pack_along(const float* x, std::int64_t row, std::int64_t count, std::int64_t all,
                std::int64_t D, float factor, Panels to, Vec& odd) {
  for (std::int64_t i = 0; i < all; i += kSide)
    for (std::int64_t d = 0; d < D; d += kDepth) {
      const std::int64_t some = std::clamp<std::int64_t>(count - i, 0, kSide);
      const float* at = x + i * row + d;
      pack_squares<Turned>({at, some}, {at + kSide, d + kSide < D ? some : 0}, row, factor,
                           to.from(i).below(d).at, odd);
    }
}

// The same where rows are summed over: each is a row of a right operand or, turned, a column of a
// left one.
template <bool Turned>
void pack_across(const float* x, std::int64_t row, std::int64_t count, std::int64_t D, float factor,
                 Panels to, Vec& odd) {
  for (std::int64_t i = 0; i < count; i += kDepth)
    for (std::int64_t d = 0; d < D; d += kSide) {
      const auto some = [&](std::int64_t left) { return std::clamp<std::int64_t>(left, 0, kSide); };
      const float* at = x + i * row + d;
      pack_squares<Turned>({at, some(count - i)}, {at + kSide * row, some(count - i - kSide)}, row,
                           factor, to.from(d).below(i).at, odd);
    }
}

// Rows of memory that are fetched into the cache little by little, while products run.
class Ahead {
 public:
  explicit Ahead(std::int64_t width) : width_(width) {}

  // Rows to be read, and those to be written, which no other core may keep.
  void read(const float* at, std::int64_t row, std::int64_t rows) { add({at, row, rows, false}); }
  void write(const float* at, std::int64_t row, std::int64_t rows) { add({at, row, rows, true}); }

  void fetch() {
    constexpr std::int64_t line = 16, some = 48;
    for (std::int64_t left = some; left > 0 && at_ < count_;) {
      const Rows& x = rows_[at_];
      for (; left > 0 && row_ < x.rows; ++row_, left -= width_ / line)
        for (std::int64_t d = 0; d < width_; d += line)
          if (x.written)
            __builtin_prefetch(x.at + row_ * x.row + d, 1);
          else
            __builtin_prefetch(x.at + row_ * x.row + d, 0, 2);
      if (row_ == x.rows) ++at_, row_ = 0;
    }
  }

 private:
  struct Rows {
    const float* at;
    std::int64_t row, rows;
    bool written;
  };
  void add(Rows rows) { rows_[count_++] = rows; }

  std::int64_t width_, at_ = 0, row_ = 0;
  int count_ = 0;
  Rows rows_[8];
};

// C (+)= A B; rows and columns are multiples of kSide, the depth is one of kDepth.
inline void multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, Panels a,
                     Panels b, float* c, std::int64_t c_row, bool add, Ahead& ahead) {
  constexpr std::int64_t pair = 2 * kSide;
  for (std::int64_t i = 0; i < rows; i += pair)
    for (std::int64_t j = 0; j < columns; j += pair) {
      const bool tall = i + kSide < rows, wide = j + kSide < columns;
      const auto run = tall ? (wide ? tiles::product<2, 2> : tiles::product<2, 1>)
                            : (wide ? tiles::product<1, 2> : tiles::product<1, 1>);
      float* to = c + i * c_row + j;
      ahead.fetch();
      run(depth / kDepth, a.from(i).at, a.apart, b.from(j).at, b.apart, add ? to : nullptr, c_row,
          to, c_row);
    }
}

// Turn [D, columns] into rows of D, each times its share.
inline void turn_back(const float* sums, std::int64_t columns, const float* share,
                      std::int64_t count, std::int64_t D, float* out, std::int64_t row) {
  for (std::int64_t i = 0; i < count; i += kLanes)
    for (std::int64_t d = 0; d < D; d += kLanes) {
      Vec square[kLanes];
      for (int n = 0; n < kLanes; ++n)
        square[n] = load(sums + (d + n) * columns + i) * load(share + i);
      transpose(square);
      for (int n = 0; n < kLanes && i + n < count; ++n) store(out + (i + n) * row + d, square[n]);
    }
}

// Memory that is handed out from the start.
class Space {
 public:
  explicit Space(float* at) : at_(at) {}
  float* take(std::int64_t floats) { return std::exchange(at_, at_ + floats); }
  Panels panels(std::int64_t rows, std::int64_t depth) {
    const std::int64_t apart = blocks(depth, kDepth) * kBlock;
    return {take(blocks(rows, kSide) * apart), apart};
  }

 private:
  float* at_;
};

// Words that a packed operand takes.
inline std::int64_t words(std::int64_t rows, std::int64_t depth) {
  return blocks(rows, kSide) * blocks(depth, kDepth) * kBlock;
}

}  // namespace fnml::tiled
#endif
