// Packed operands of products on matrix tiles that are used more than once, and their products.
#pragma once

#include "matrices.h"
#include "tiles.h"

#if FNML_TILES

namespace fnml::tiled {

using tiles::kBlock;
using tiles::kSide;

// A packed operand: panels of kSide rows or columns, `apart` words from one to the next.
struct Panels {
  float* at;
  std::int64_t apart;

  Panels from(std::int64_t row) const { return {at + row / kSide * apart, apart}; }
  // From some depth on, a multiple of tiles::kDepth.
  Panels below(std::int64_t depth) const { return {at + depth / tiles::kDepth * kBlock, apart}; }
};

inline std::int64_t whole(std::int64_t depth) {
  return blocks(depth, tiles::kDepth) * tiles::kDepth;
}

// Pack `count` rows or columns; those that are missing in the last panel are 0.
template <bool Left>
void pack(tiles::Operand x, std::int64_t count, std::int64_t depth, Panels to, Vec& odd) {
  for (std::int64_t i = 0; i < count; i += kSide)
    tiles::pack<Left>({x.at + i * x.row, x.row, x.column}, std::min<std::int64_t>(kSide, count - i),
                      depth, to.from(i).at, odd);
}

// C (+)= A B; rows and columns are multiples of kSide, the depth is one of tiles::kDepth.
inline void multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, Panels a,
                     Panels b, float* c, std::int64_t c_row, bool add) {
  constexpr std::int64_t pair = 2 * kSide;
  for (std::int64_t i = 0; i < rows; i += pair)
    for (std::int64_t j = 0; j < columns; j += pair) {
      const bool tall = i + kSide < rows, wide = j + kSide < columns;
      const auto run = tall ? (wide ? tiles::product<2, 2> : tiles::product<2, 1>)
                            : (wide ? tiles::product<1, 2> : tiles::product<1, 1>);
      float* to = c + i * c_row + j;
      run(depth / tiles::kDepth, a.from(i).at, a.apart, b.from(j).at, b.apart, add ? to : nullptr,
          c_row, to, c_row);
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
    const std::int64_t apart = blocks(depth, tiles::kDepth) * kBlock;
    return {take(blocks(rows, kSide) * apart), apart};
  }

 private:
  float* at_;
};

// Words that a packed operand takes.
inline std::int64_t words(std::int64_t rows, std::int64_t depth) {
  return blocks(rows, kSide) * blocks(depth, tiles::kDepth) * kBlock;
}

}  // namespace fnml::tiled
#endif
