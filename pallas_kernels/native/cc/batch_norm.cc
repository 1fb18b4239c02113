// Batch normalisation of float32 rows, then a sum with others, if there are any, and ReLU.
//
// Each direction reads memory twice: for its sums, and for its result. The sums are taken in
// parts that depend on the shapes alone, and the parts are added up in their order.
#include <cmath>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "span.h"

namespace fnml {
namespace {

constexpr std::int64_t kRows = 16;  // whose mean is taken before that of all

struct Rows {
  std::int64_t first, stop;

  Rows(std::int64_t rows, std::int64_t parts, std::int64_t part) {
    const std::int64_t share = (rows + parts - 1) / parts;
    first = std::min(rows, part * share);
    stop = std::min(rows, first + share);
  }
};

// Means and sums of squares about them, of two disjoint sets: the first becomes that of both.
// Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm".
void merge(float count, Vec& mean, Vec& square, float more, Vec other, Vec other_square) {
  const Vec apart = other - mean;
  mean += apart * (more / (count + more));
  square += other_square + apart * apart * (count * more / (count + more));
}

// Write the mean and the sum of squares about it of some rows: [2, C].
void moments(const float* x, Rows rows, std::int64_t C, float* out) {
  std::fill_n(out, 2 * C, 0.0f);
  for (std::int64_t i = rows.first; i < rows.stop; i += kRows) {
    const std::int64_t many = std::min(kRows, rows.stop - i);
    each_vector(C, [&](std::int64_t c, auto vector) {
      Vec total{}, square{};
      for (std::int64_t n = i; n < i + many; ++n) total += vector.load(x + n * C + c);
      const Vec mean = total * (1.0f / many);
      for (std::int64_t n = i; n < i + many; ++n) {
        const Vec centred = vector.load(x + n * C + c) - mean;
        square += centred * centred;
      }
      Vec all = vector.load(out + c), all_square = vector.load(out + C + c);
      merge(i - rows.first, all, all_square, many, mean, square);
      vector.store(out + c, all);
      vector.store(out + C + c, all_square);
    });
  }
}

ffi::Error Forward(ffi::ThreadPool pool, float eps, Floats<2> x, Floats<1> scale, Floats<1> bias,
                   Floats<2> residual, ffi::Result<Floats<2>> y, ffi::Result<Floats<1>> mean,
                   ffi::Result<Floats<1>> variance, ffi::Result<Floats<3>> partial) {
  const std::int64_t N = x.dimensions()[0], C = x.dimensions()[1];
  const std::int64_t parts = partial->dimensions()[0];
  const float *xs = x.typed_data(), *biases = bias.typed_data(), *scales = scale.typed_data();
  const float* added = residual.dimensions()[0] ? residual.typed_data() : nullptr;
  float *ys = y->typed_data(), *means = mean->typed_data(), *variances = variance->typed_data();
  float* sums = partial->typed_data();
  parallel(pool, parts,
           [&](std::int64_t part) { moments(xs, Rows(N, parts, part), C, sums + part * 2 * C); });
  std::vector<float> gains(C);
  each_vector(C, [&](std::int64_t c, auto vector) {
    Vec all{}, square{};
    for (std::int64_t part = 0; part < parts; ++part) {
      const Rows rows(N, parts, part);
      if (rows.stop > rows.first)
        merge(rows.first, all, square, rows.stop - rows.first, vector.load(sums + part * 2 * C + c),
              vector.load(sums + (part * 2 + 1) * C + c));
    }
    vector.store(means + c, all);
    vector.store(variances + c, square * (1.0f / N));
  });
  for (std::int64_t c = 0; c < C; ++c) gains[c] = scales[c] / std::sqrt(variances[c] + eps);
  parallel(pool, parts, [&](std::int64_t part) {
    const Rows rows(N, parts, part);
    for (std::int64_t n = rows.first; n < rows.stop; ++n)
      each_vector(C, [&](std::int64_t c, auto vector) {
        const Vec centred = vector.load(xs + n * C + c) - vector.load(means + c);
        Vec out = centred * vector.load(gains.data() + c) + vector.load(biases + c);
        if (added) out += vector.load(added + n * C + c);
        // A NaN is not less than 0, and stays.
        vector.store(ys + n * C + c, out < 0.0f ? Vec{} : out);
      });
  });
  return ffi::Error::Success();
}

// `out` is the result; `grad_residual` is empty where nothing was added.
ffi::Error Backward(ffi::ThreadPool pool, float eps, Floats<2> x, Floats<1> scale, Floats<1> mean,
                    Floats<1> variance, Floats<2> out, Floats<2> grad,
                    ffi::Result<Floats<2>> grad_x, ffi::Result<Floats<1>> grad_scale,
                    ffi::Result<Floats<1>> grad_bias, ffi::Result<Floats<2>> grad_residual,
                    ffi::Result<Floats<3>> partial) {
  const std::int64_t N = x.dimensions()[0], C = x.dimensions()[1];
  const std::int64_t parts = partial->dimensions()[0];
  const float *xs = x.typed_data(), *means = mean.typed_data(), *grads = grad.typed_data();
  const float* seen = out.typed_data();
  float* kept = grad_residual->dimensions()[0] ? grad_residual->typed_data() : nullptr;
  float *result = grad_x->typed_data(), *sums = partial->typed_data();
  const auto slope = [&](std::int64_t at, auto vector) {
    return vector.load(seen + at) > 0.0f ? vector.load(grads + at) : Vec{};
  };
  parallel(pool, parts, [&](std::int64_t part) {
    const Rows rows(N, parts, part);
    float* own = sums + part * 2 * C;
    std::fill_n(own, 2 * C, 0.0f);
    for (std::int64_t i = rows.first; i < rows.stop; i += kRows)
      each_vector(C, [&](std::int64_t c, auto vector) {
        const Vec middle = vector.load(means + c);
        Vec total{}, product{};
        for (std::int64_t n = i; n < std::min(rows.stop, i + kRows); ++n) {
          const Vec g = slope(n * C + c, vector);
          total += g;
          product += g * (vector.load(xs + n * C + c) - middle);
          if (kept) vector.store(kept + n * C + c, g);
        }
        vector.store(own + c, vector.load(own + c) + total);
        vector.store(own + C + c, vector.load(own + C + c) + product);
      });
  });
  // The gradient of x is first * g - second * (x - mean) - third.
  std::vector<float> factors(3 * C);
  for (std::int64_t c = 0; c < C; ++c) {
    float total = 0, product = 0;
    for (std::int64_t part = 0; part < parts; ++part) {
      total += sums[part * 2 * C + c];
      product += sums[(part * 2 + 1) * C + c];
    }
    const float inverse = 1.0f / (variance.typed_data()[c] + eps), root = std::sqrt(inverse);
    const float gain = scale.typed_data()[c] * root;
    grad_scale->typed_data()[c] = product * root;
    grad_bias->typed_data()[c] = total;
    factors[c] = gain;
    factors[C + c] = gain * inverse * product / N;
    factors[2 * C + c] = gain * total / N;
  }
  parallel(pool, parts, [&](std::int64_t part) {
    const Rows rows(N, parts, part);
    for (std::int64_t n = rows.first; n < rows.stop; ++n)
      each_vector(C, [&](std::int64_t c, auto vector) {
        const std::int64_t at = n * C + c;
        const Vec g = kept ? vector.load(kept + at) : slope(at, vector);
        const Vec centred = vector.load(xs + at) - vector.load(means + c);
        vector.store(result + at, g * vector.load(factors.data() + c) -
                                      centred * vector.load(factors.data() + C + c) -
                                      vector.load(factors.data() + 2 * C + c));
      });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fnml

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_batch_norm_relu_forward, fnml::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<3>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fnml_batch_norm_relu_backward, fnml::Backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Arg<fnml::Floats<1>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Arg<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<1>>()
                                  .Ret<fnml::Floats<2>>()
                                  .Ret<fnml::Floats<3>>());
