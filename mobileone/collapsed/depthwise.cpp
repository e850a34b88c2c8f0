// CPU kernels of collapsed depthwise 3×3 blocks: float32, NCHW, one task a channel, so that sums do
// not depend on the number of threads. Names follow docs/collapsed-training.md. Compiled and loaded
// by native.py; plain C symbols, no PyTorch headers.

#include <algorithm>
#include <cstdint>

#include "input_gradient.h"
#include "moments.h"
#include "planes.h"

namespace {

template <int STRIDE>
void forward(int threads, const Shape& s, const float* x, const float* shift,
             const double* weight, const double* bias, bool relu, float* y) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 1);
    const TapList none{};
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      Differences taps;
      for (int u = 0; u < 9; ++u)
        taps.add(plane.at(u / 3 - 1, u % 3 - 1) - plane.at(0, 0), weight[9 * c + u]);
      for (int64_t n = 0; n < s.batch; ++n) {
        plane.fill(x + (n * s.channels + c) * s.in_size(), shift[c]);
        float* to = y + (n * s.channels + c) * s.out_size();
        for (int64_t r = 0; r < s.out_height; ++r, to += s.out_width)
          combine_row(taps, plane.at(STRIDE * r, 0), none, plane.at(0, 0), float(bias[c]), s.out_width,
                      [&](const V& v, int64_t i) {
                        store_part(to, relu ? (v < 0.0f ? V{} : v) : v, i, s.out_width);
                      });
      }
    }
  }
}

// The same for one channel in float64.
template <int STRIDE>
void careful_weight_gradient(const Shape& s, const float* g, const float* y, const float* x,
                             int64_t c, Padded<STRIDE>& plane, Padded<1>& slope,
                             const double* mean, double* weight_grad, double* bias_grad) {
  double sums[10] = {};
  for (int64_t n = 0; n < s.batch; ++n) {
    const int64_t out = (n * s.channels + c) * s.out_size();
    plane.fill(x + (n * s.channels + c) * s.in_size());
    slope.fill_rectified(g + out, y ? y + out : nullptr);
    for (int64_t r = 0; r < s.out_height; ++r) {
      const float* here = slope.at(r, 0);
      for (int u = 0; u < 9; ++u) {
        const float* tap = plane.at(STRIDE * r + u / 3 - 1, u % 3 - 1);
        double sum = 0.0;
        for (int64_t i = 0; i < s.out_width; ++i) sum += here[i] * (tap[i] - mean[u]);
        sums[u] += sum;
      }
      for (int64_t i = 0; i < s.out_width; ++i) sums[9] += here[i];
    }
  }
  std::copy(sums, sums + 9, weight_grad);
  *bias_grad = sums[9];
}

template <int STRIDE>
void weight_gradient(int threads, const Shape& s, const float* g, const float* y, const float* x,
                     const double* mean, const bool* thin, double* weight_grad,
                     double* bias_grad) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 1);
    Padded<1> slope(s.out_height, s.out_width, 0);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      if (thin[c]) {
        careful_weight_gradient(s, g, y, x, c, plane, slope, mean + 9 * c, weight_grad + 9 * c,
                                bias_grad + c);
        continue;
      }
      Wide totals[10] = {};
      V acc[10] = {};
      float m[9];
      std::copy(mean + 9 * c, mean + 9 * c + 9, m);
      int64_t pending = 0;
      for (int64_t n = 0; n < s.batch; ++n) {
        const int64_t out = (n * s.channels + c) * s.out_size();
        plane.fill(x + (n * s.channels + c) * s.in_size());
        slope.fill_rectified(g + out, y ? y + out : nullptr);
        for (int64_t r = 0; r < s.out_height; ++r) {
          const float *here = slope.at(r, 0), *tap[9];
          for (int u = 0; u < 9; ++u) tap[u] = plane.at(STRIDE * r + u / 3 - 1, u % 3 - 1);
          for (int64_t i = 0; i < s.out_width; i += LANES) {
            const V value = load(here + i);
#pragma GCC unroll 9
            for (int u = 0; u < 9; ++u) acc[u] += value * (load(tap[u] + i) - m[u]);
            acc[9] += value;
          }
          // Σ g may be next to nothing: its sums are as short as rows
          totals[9] += __builtin_convertvector(acc[9], Wide), acc[9] = V{};
          if ((pending += s.out_width) >= CHUNK) drain(acc, totals), pending = 0;
        }
      }
      drain(acc, totals);
      bias_grad[c] = total(totals[9]);
      for (int u = 0; u < 9; ++u)  // and what the mean lost as a float
        weight_grad[9 * c + u] = total(totals[u]) - bias_grad[c] * (mean[9 * c + u] - m[u]);
    }
  }
}

template <int STRIDE>
void input_gradient(int threads, const Shape& s, const float* g, const float* y, const float* x,
                    const float* shift, const double* weight, const double* slope,
                    const double* offset, float* dx) {
#pragma omp parallel num_threads(threads)
  {
    InputGradient<STRIDE> gradient(s);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      gradient.prepare(weight + 9 * c, slope + 81 * c, offset + 9 * c, shift[c]);
      for (int64_t n = 0; n < s.batch; ++n) {
        const int64_t in = (n * s.channels + c) * s.in_size();
        const int64_t out = (n * s.channels + c) * s.out_size();
        gradient.plane(g + out, y ? y + out : nullptr, x + in, dx + in);
      }
    }
  }
}

}  // namespace

extern "C" {

// m (C, 9) and C (C, 9, 9) of the patches of x.
void depthwise_moments(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, double* mean, double* cov) {
  const Shape s(batch, channels, height, width, stride);
  if (stride == 1)
    moments<1, Correlations>(threads, s, x, mean, cov);
  else
    moments<2, Products>(threads, s, x, mean, cov);
}

// The same in float64 for the channels named, `count` of them, and only for these.
void depthwise_careful_moments(int threads, int64_t batch, int64_t channels, int64_t height,
                               int64_t width, int64_t stride, const float* x, int64_t count,
                               const int64_t* which, double* mean, double* cov) {
  const Shape s(batch, channels, height, width, stride);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = which[i];
    (stride == 1 ? careful_moments<1> : careful_moments<2>)(s, x, c, mean + 9 * c, cov + 81 * c);
  }
}

// y = Ŵ ∗ (x − shift) + b̂, rectified on demand; weight (C, 9), shift and bias (C).
void depthwise_forward(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, const float* shift, const double* weight,
                       const double* bias, int64_t relu, float* y) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? forward<1> : forward<2>)(threads, s, x, shift, weight, bias, relu != 0, y);
}

// Σ g (x − m) (C, 9) and Σ g (C) over the patches, g behind the rectifier (y null: there is none);
// thin channels (C) in float64.
void depthwise_weight_grad(int threads, int64_t batch, int64_t channels, int64_t height,
                           int64_t width, int64_t stride, const float* g, const float* y,
                           const float* x, const double* mean, const bool* thin,
                           double* weight_grad, double* bias_grad) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? weight_gradient<1> : weight_gradient<2>)(threads, s, g, y, x, mean, thin,
                                                         weight_grad, bias_grad);
}

// ∂L/∂x, the part through the batch statistics included: slope S (C, 9, 9) and offset r (C, 9) of the
// patches less a shift (C).
void depthwise_input_grad(int threads, int64_t batch, int64_t channels, int64_t height,
                          int64_t width, int64_t stride, const float* g, const float* y,
                          const float* x, const float* shift, const double* weight,
                          const double* slope, const double* offset, float* dx) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? input_gradient<1> : input_gradient<2>)(threads, s, g, y, x, shift, weight, slope,
                                                       offset, dx);
}

}  // extern "C"
