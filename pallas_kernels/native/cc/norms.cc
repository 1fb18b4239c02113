// RMSNorm and LayerNorm over float32 rows, with the sum before them; each direction reads and
// writes memory once: what is needed again of a row is still in the cache.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "span.h"

namespace fnml {
namespace {

namespace ffi = xla::ffi;

using Vector = ffi::Buffer<ffi::F32, 1>;
using Rows = ffi::Buffer<ffi::F32, 2>;  // of no rows: this array is not there

constexpr std::int64_t kPiece = 1 << 14;  // floats that are worth a piece of work
constexpr std::int64_t kPieces = 64;      // whose sums over rows are added at the end

// The rows [N, D] of a piece of work: by the sizes only, so that sums have one order.
std::int64_t rows_of_piece(std::int64_t N, std::int64_t D, std::int64_t pieces) {
  return std::max({kPiece / D, (N + pieces - 1) / pieces, std::int64_t{1}});
}

// Call work(first row, number of rows, piece) for all pieces, on all threads.
template <typename Work>
std::int64_t over_rows(ffi::ThreadPool& pool, std::int64_t N, std::int64_t rows, const Work& work) {
  const std::int64_t pieces = (N + rows - 1) / rows;
  parallel(pool, pieces, [&](std::int64_t piece) {
    work(piece * rows, std::min(rows, N - piece * rows), piece);
  });
  return pieces;
}

// What is taken from a row, and the factor it is multiplied by.
struct Moments {
  float mean, inverse;
};

template <bool Centred>
float mean(const float* row, std::int64_t D) {
  if constexpr (!Centred) return 0.0f;
  Vec all{};
  each_vector(D, [&](std::int64_t d, auto vector) { all += vector.load(row + d); });
  return sum(all) / static_cast<float>(D);
}

float inverse(Vec squares, std::int64_t D, float eps) {
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(D) + eps);
}

template <bool Centred>
void forward_row(const float* x, const float* residual, const float* scale, const float* bias,
                 std::int64_t D, float eps, float* out, float* total) {
  if (residual) {
    each_vector(D, [&](std::int64_t d, auto vector) {
      vector.store(total + d, vector.load(x + d) + vector.load(residual + d));
    });
    x = total;
  }
  const float centre = mean<Centred>(x, D);
  Vec squares{};
  each_vector(D, [&](std::int64_t d, auto vector) {
    const Vec part = vector.keep(vector.load(x + d) - centre);
    squares += part * part;
  });
  const float factor = inverse(squares, D, eps);
  each_vector(D, [&](std::int64_t d, auto vector) {
    Vec y = (vector.load(x + d) - centre) * factor * vector.load(scale + d);
    if (bias) y += vector.load(bias + d);
    vector.store(out + d, y);
  });
}

template <bool Centred>
void forward(ffi::ThreadPool& pool, float eps, Rows& x, Vector& scale, Vector& bias, Rows& residual,
             Rows& out, Rows& total) {
  const std::int64_t N = x.dimensions()[0], D = x.dimensions()[1];
  const float *xs = x.typed_data(), *scales = scale.typed_data();
  const float* biases = bias.element_count() ? bias.typed_data() : nullptr;
  const float* residuals = residual.element_count() ? residual.typed_data() : nullptr;
  float *outs = out.typed_data(), *totals = total.typed_data();
  over_rows(pool, N, rows_of_piece(N, D, N), [&](std::int64_t first, std::int64_t rows, auto) {
    for (std::int64_t at = first * D; at < (first + rows) * D; at += D)
      forward_row<Centred>(xs + at, residuals ? residuals + at : nullptr, scales, biases, D, eps,
                           outs + at, residuals ? totals + at : nullptr);
  });
}

// Write the gradient of one row; add its parts of the vectors' gradients to theirs.
template <bool Centred>
void backward_row(const float* x, const float* scale, const float* grad, const float* grad_total,
                  std::int64_t D, float eps, float* grad_x, float* grad_scale, float* grad_bias) {
  const float centre = mean<Centred>(x, D);
  Vec squares{}, slopes{}, along{};
  each_vector(D, [&](std::int64_t d, auto vector) {
    const Vec part = vector.keep(vector.load(x + d) - centre);
    const Vec slope = vector.load(grad + d) * vector.load(scale + d);
    squares += part * part;
    along += part * slope;
    if constexpr (Centred) slopes += slope;
  });
  const float factor = inverse(squares, D, eps), width = static_cast<float>(D);
  const float level = Centred ? sum(slopes) / width : 0.0f;
  const float lean = factor * (sum(along) / width);
  each_vector(D, [&](std::int64_t d, auto vector) {
    const Vec unit = (vector.load(x + d) - centre) * factor, slope = vector.load(grad + d);
    Vec y = (slope * vector.load(scale + d) - level - unit * lean) * factor;
    if (grad_total) y += vector.load(grad_total + d);
    vector.store(grad_x + d, y);
    vector.store(grad_scale + d, vector.load(grad_scale + d) + slope * unit);
    if (grad_bias) vector.store(grad_bias + d, vector.load(grad_bias + d) + slope);
  });
}

// Add the pieces' sums [pieces, D], one after the other.
void add_pieces(const float* sums, std::int64_t pieces, std::int64_t D, float* out) {
  each_vector(D, [&](std::int64_t d, auto vector) {
    Vec all{};
    for (std::int64_t piece = 0; piece < pieces; ++piece) all += vector.load(sums + piece * D + d);
    vector.store(out + d, all);
  });
}

template <bool Centred>
void backward(ffi::ThreadPool& pool, float eps, Rows& total, Vector& scale, Rows& grad,
              Rows& grad_total, Rows& grad_x, Vector& grad_scale, Vector& grad_bias) {
  const std::int64_t N = total.dimensions()[0], D = total.dimensions()[1];
  const float *xs = total.typed_data(), *scales = scale.typed_data();
  const float* grads = grad.typed_data();
  const float* more = grad_total.element_count() ? grad_total.typed_data() : nullptr;
  float* grad_xs = grad_x.typed_data();
  const bool shifted = grad_bias.element_count() > 0;
  std::vector<float> scale_sums(kPieces * D), bias_sums(shifted ? kPieces * D : 0);
  const std::int64_t pieces =
      over_rows(pool, N, rows_of_piece(N, D, kPieces),
                [&](std::int64_t first, std::int64_t rows, std::int64_t piece) {
                  for (std::int64_t at = first * D; at < (first + rows) * D; at += D)
                    backward_row<Centred>(xs + at, scales, grads + at, more ? more + at : nullptr,
                                          D, eps, grad_xs + at, scale_sums.data() + piece * D,
                                          shifted ? bias_sums.data() + piece * D : nullptr);
                });
  add_pieces(scale_sums.data(), pieces, D, grad_scale.typed_data());
  if (shifted) add_pieces(bias_sums.data(), pieces, D, grad_bias.typed_data());
}

ffi::Error Forward(ffi::ThreadPool pool, float eps, std::int64_t centred, Rows x, Vector scale,
                   Vector bias, Rows residual, ffi::Result<Rows> out, ffi::Result<Rows> total) {
  (centred ? forward<true> : forward<false>)(pool, eps, x, scale, bias, residual, *out, *total);
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, float eps, std::int64_t centred, Rows total, Vector scale,
                    Rows grad, Rows grad_total, ffi::Result<Rows> grad_x,
                    ffi::Result<Vector> grad_scale, ffi::Result<Vector> grad_bias) {
  (centred ? backward<true> : backward<false>)(pool, eps, total, scale, grad, grad_total, *grad_x,
                                               *grad_scale, *grad_bias);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_norm_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<std::int64_t>("centred")
                                  .Arg<fnml::Rows>()
                                  .Arg<fnml::Vector>()
                                  .Arg<fnml::Vector>()
                                  .Arg<fnml::Rows>()
                                  .Ret<fnml::Rows>()
                                  .Ret<fnml::Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_norm_backward, fnml::Backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<std::int64_t>("centred")
                                  .Arg<fnml::Rows>()
                                  .Arg<fnml::Vector>()
                                  .Arg<fnml::Rows>()
                                  .Arg<fnml::Rows>()
                                  .Ret<fnml::Rows>()
                                  .Ret<fnml::Vector>()
                                  .Ret<fnml::Vector>());
