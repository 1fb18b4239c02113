// Products of float32 matrices on matrix tiles (Intel AMX), which multiply bfloat16 numbers.
//
// Three bfloat16 numbers hold a float: x = x0 + x1 + x2, each less than 2^-8 of the one before. Of
// the nine products of two such sums the six largest are added up, in float32; what is left out is
// below 2^-24 of the product, as is one rounding. Henry, Tang and Heinecke 2019, arXiv:1904.06376.
#pragma once

#if defined(__AVX512F__) && \
    (defined(FNML_EMULATED_TILES) || (defined(__AMX_BF16__) && defined(__linux__)))
#define FNML_TILES 1

#include "vector.h"
#ifdef FNML_EMULATED_TILES
#include "emulated_tiles.h"
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fnml::tiles {

constexpr int kSide = 16;               // rows of a tile, and numbers in a row of a result's
constexpr int kDepth = 2 * kSide;       // numbers in a row of an operand's, of bfloat16
constexpr int kTile = kSide * kSide;    // words of 32 bits in a tile
constexpr int kParts = 3;               // of a float
constexpr int kBlock = kParts * kTile;  // words of a panel, kSide rows or columns, at one kDepth

// Ask the system for the tiles: whether this process may use them.
inline bool allowed() {
#ifdef FNML_EMULATED_TILES
  return true;
#else
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool answer = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return answer;
#endif
}

// All tiles of this thread have 16 rows of 64 bytes while this lives.
class Registers {
 public:
  Registers() {
    alignas(64) struct {
      std::uint8_t palette = 1, start = 0, unused[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = kSide;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shape);
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));

// The three parts of a vector's numbers, in the upper halves of words; the lower ones are to be
// left out.
struct Cut {
  Words part[kParts];
};

// The first part is the nearest bfloat16 number. Of what remains, of 16 binary digits at most, the
// second has the first eight and the third the others. `odd` becomes NaN where a number is not
// finite, or no bfloat16 number is near it.
inline Cut cut(Vec x, Vec& odd) {
  const auto upper = [](Words word) { return reinterpret_cast<Vec>(word & 0xffff0000u); };
  Cut to;
  to.part[0] = reinterpret_cast<Words>(x) + 0x8000u;
  const Vec rest = x - upper(to.part[0]);
  to.part[1] = reinterpret_cast<Words>(rest);
  const Vec last = rest - upper(to.part[1]);
  to.part[2] = reinterpret_cast<Words>(last);
  odd += last * 0.0f;
  return to;
}

// Write words of pairs, the parts a tile apart.
inline void join(const Cut& low, const Cut& high, float* to) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    constexpr int low_or_upper_high = 0xf8;  // a | (b & c)
    const Words pairs = reinterpret_cast<Words>(_mm512_ternarylogic_epi32(
        reinterpret_cast<__m512i>(low.part[i] >> 16), reinterpret_cast<__m512i>(high.part[i]),
        _mm512_set1_epi32(static_cast<int>(0xffff0000u)), low_or_upper_high));
    store(to + i * kTile, reinterpret_cast<Vec>(pairs));
  }
}

// A matrix in memory: entry (i, k) is at[i * row + k * column]; one of the two is 1.
struct Operand {
  const float* at;
  std::int64_t row, column;
};

// Pack up to kSide rows of a left operand, or columns of a right one: words pair the numbers of the
// lower and the upper half of a tile's depth.
template <bool Left>
void pack(Operand x, std::int64_t count, std::int64_t depth, float* to, Vec& odd) {
  for (std::int64_t k = 0; k < depth; k += kDepth, to += kBlock) {
    Operand from{x.at + k * x.column, x.row, x.column};
    alignas(64) float whole[kSide * kDepth];
    const std::int64_t deep = depth - k < kDepth ? depth - k : kDepth;
    if (count < kSide || deep < kDepth) {
      std::memset(whole, 0, sizeof whole);
      const bool along = from.column == 1;
      const Operand padded{whole, along ? kDepth : 1, along ? 1 : kSide};
      for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t j = 0; j < deep; ++j)
          whole[i * padded.row + j * padded.column] = from.at[i * from.row + j * from.column];
      from = padded;
    }
    const bool along = from.column == 1;
    const std::int64_t next = along ? from.row : from.column;
    // The next panel's numbers: of rows, which lie apart, the processor fetches nothing ahead.
    if (!along)
      for (int j = 0; j < kDepth; ++j) __builtin_prefetch(from.at + j * next + kSide);
    const auto read = [&](int i, int half) {
      return load(from.at + i * next + half * kSide * from.column);
    };
    const auto write = [&](int i, Vec low, Vec high) {
      join(cut(low, odd), cut(high, odd), to + i * kSide);
    };
    if (along == Left) {
      for (int i = 0; i < kSide; ++i) write(i, read(i, 0), read(i, 1));
    } else {
      Vec low[kSide], high[kSide];
      for (int i = 0; i < kSide; ++i) low[i] = read(i, 0), high[i] = read(i, 1);
      transpose(low);
      transpose(high);
      for (int i = 0; i < kSide; ++i) write(i, low[i], high[i]);
    }
  }
}

template <int I>
inline void load_left(const float* at, std::int64_t apart) {
  _tile_loadd(4, at, 64);
  if constexpr (I == 2) _tile_loadd(5, at + apart, 64);
}
template <int J>
inline void load_right(const float* at, std::int64_t apart) {
  _tile_loadd(6, at, 64);
  if constexpr (J == 2) _tile_loadd(7, at + apart, 64);
}
template <int I, int J>
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (J == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (I == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (I == 2 && J == 2) _tile_dpbf16ps(3, 5, 7);
}

template <int I, int J>
void product(std::int64_t blocks, const float* left, std::int64_t left_apart, const float* right,
             std::int64_t right_apart, const float* start, std::int64_t start_row, float* c,
             std::int64_t c_row) {
  asm volatile("" ::: "memory");
  if (start) {
    const std::int64_t row = 4 * start_row;
    _tile_loadd(0, start, row);
    if constexpr (J == 2) _tile_loadd(1, start + kSide, row);
    if constexpr (I == 2) _tile_loadd(2, start + kSide * start_row, row);
    if constexpr (I == 2 && J == 2) _tile_loadd(3, start + kSide * start_row + kSide, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // C's rows come into the cache meanwhile: a store would wait for each of them.
  const std::int64_t fetched = start ? 0 : (I * kSide + blocks - 1) / blocks;
  for (std::int64_t b = 0; b < blocks; ++b, left += kBlock, right += kBlock) {
    for (std::int64_t i = b * fetched; i < (b + 1) * fetched && i < I * kSide; ++i)
      for (int j = 0; j < J; ++j) __builtin_prefetch(c + i * c_row + j * kSide, 1);

    load_left<I>(left + 2 * kTile, left_apart);
    load_right<J>(right, right_apart);
    add_products<I, J>();
    load_left<I>(left + kTile, left_apart);
    add_products<I, J>();
    load_right<J>(right + kTile, right_apart);
    add_products<I, J>();
    load_left<I>(left, left_apart);
    add_products<I, J>();
    load_right<J>(right + 2 * kTile, right_apart);
    add_products<I, J>();
    load_right<J>(right, right_apart);
    add_products<I, J>();
  }
  const std::int64_t row = 4 * c_row;
  _tile_stored(0, c, row);
  if constexpr (J == 2) _tile_stored(1, c + kSide, row);
  if constexpr (I == 2) _tile_stored(2, c + kSide * c_row, row);
  if constexpr (I == 2 && J == 2) _tile_stored(3, c + kSide * c_row + kSide, row);
  asm volatile("" ::: "memory");
}

}  // namespace fnml::tiles
#endif
