// Small matrix products whose right side lies in rows: C (+)= A B.
#pragma once

#include <algorithm>

#include "vector.h"

namespace fnml {

// A matrix in memory: entry (i, j) is at[i * row + j * column].
struct Matrix {
  const float* at;
  std::int64_t row;
  std::int64_t column;
};

// Rows of a result that are kept in registers beside `vectors` columns of vectors of B.
constexpr int rows_in_registers(int vectors) {
  return std::min(12, (kRegisters - vectors - 1) / vectors);
}

template <int Rows, int Vectors>
inline __attribute__((always_inline)) void tile(std::int64_t depth, Matrix a, const float* b,
                                                std::int64_t b_row, float* c, std::int64_t c_row,
                                                bool add) {
  Vec sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : Vec{};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec right[Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + k * b_row + j * kLanes);
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
    for (int j = 0; j < Vectors; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

template <int Vectors, int Rows = rows_in_registers(Vectors)>
inline void columns(std::int64_t rows, std::int64_t depth, Matrix a, const float* b,
                    std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
  std::int64_t i = 0;
  for (; i + Rows <= rows; i += Rows)
    tile<Rows, Vectors>(depth, {a.at + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row,
                        add);
  if constexpr (Rows > 1) {
    if (i < rows)
      columns<Vectors, Rows / 2>(rows - i, depth, {a.at + i * a.row, a.row, a.column}, b, b_row,
                                 c + i * c_row, c_row, add);
  }
}

// C [rows, cols] (+)= A [rows, depth] B [depth, cols]; cols is a multiple of kLanes.
inline void product(std::int64_t rows, std::int64_t cols, std::int64_t depth, Matrix a,
                    const float* b, std::int64_t b_row, float* c, std::int64_t c_row, bool add) {
  std::int64_t j = 0;
  const int widest = kRegisters == 32 ? 4 : 2;
  if constexpr (widest == 4)
    for (; j + 4 * kLanes <= cols; j += 4 * kLanes)
      columns<4>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes)
    columns<2>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  for (; j < cols; j += kLanes) columns<1>(rows, depth, a, b + j, b_row, c + j, c_row, add);
}

}  // namespace fnml
