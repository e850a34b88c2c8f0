// Collapsed depthwise 3×3 blocks on a CPU: float32, NCHW, one task a channel, so that sums do not
// depend on the number of threads. A task does all that its channel needs while the planes are in
// the cache. Names follow docs/collapsed-training.md. Compiled and loaded by cpu_build.py; plain C
// symbols, no PyTorch headers.

#include <algorithm>
#include <cstdint>

#include "branches.h"
#include "input_gradient.h"
#include "moments.h"
#include "planes.h"

namespace {

// y = Ŵ ∗ (x − shift) + b̂ of a channel, rectified on demand; the padding is 0 − shift.
template <int STRIDE>
void convolve(const Shape& s, const float* x, int64_t c, Padded<STRIDE>& plane, const double* weight,
              float bias, float shift, bool relu, float* y) {
  const TapList none{};
  Differences taps;
  for (int u = 0; u < 9; ++u)
    taps.add(plane.at(u / 3 - 1, u % 3 - 1) - plane.at(0, 0), weight[u]);
  for (int64_t n = 0; n < s.batch; ++n) {
    plane.fill(x + (n * s.channels + c) * s.in_size(), shift);
    float* to = y + (n * s.channels + c) * s.out_size();
    for (int64_t r = 0; r < s.out_height; ++r, to += s.out_width)
      combine_row(taps, plane.at(STRIDE * r, 0), none, plane.at(0, 0), bias, s.out_width,
                  [&](const V& v, int64_t i) {
                    store_part(to, relu ? (v < 0.0f ? V{} : v) : v, i, s.out_width);
                  });
  }
}

// The mean of the center tap where it outweighs the spread, else 0: a shift is not free.
inline float dominant_mean(const double* mean, const double* cov) {
  return mean[4] * mean[4] <= cov[40] ? 0.0f : float(mean[4]);
}

template <int STRIDE>
void forward(int threads, const Shape& s, const float* x, const Parameters& parameters, bool relu,
             float* y, double* means, double* vars, double* mean, double* cov, bool* thin) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 2);
    ChannelBranches branches(parameters);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      double *m = mean + 9 * c, *v = cov + 81 * c, moved[9];
      moments(s, x, c, plane, m, v);
      branches.read(c);
      thin[c] = branches.ill_conditioned(m, v);
      if (thin[c]) careful_moments<STRIDE>(s, x, c, m, v);
      branches.collapse(v);
      for (int64_t i = 0; i < parameters.norms; ++i) {
        means[i * s.channels + c] = branches.mean(i, m);
        vars[i * s.channels + c] = branches.var[i];
      }
      const float shift = dominant_mean(m, v);
      for (int u = 0; u < 9; ++u) moved[u] = m[u] - shift;
      convolve(s, x, c, plane, branches.weight, float(branches.bias(moved)), shift, relu, y);
    }
  }
}

// P = Σ g (x − m)ᵀ and q = Σ g of a channel, in float64.
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

// The same in float32 for a few values, and then in float64.
template <int STRIDE>
void weight_gradient(const Shape& s, const float* g, const float* y, const float* x, int64_t c,
                     Padded<STRIDE>& plane, Padded<1>& slope, const double* mean,
                     double* weight_grad, double* bias_grad) {
  Wide totals[10] = {};
  V acc[10] = {};
  float m[9];
  std::copy(mean, mean + 9, m);
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
  *bias_grad = total(totals[9]);
  for (int u = 0; u < 9; ++u)  // and what the mean lost as a float
    weight_grad[u] = total(totals[u]) - *bias_grad * (mean[u] - m[u]);
}

template <int STRIDE>
void backward(int threads, const Shape& s, const float* g, const float* y, const float* x,
              const Parameters& parameters, const double* vars, const double* mean,
              const double* cov, const bool* thin, float* dx, float* const* grads) {
  const double number = double(s.batch) * s.out_size();
#pragma omp parallel num_threads(threads)
  {
    InputGradient<STRIDE> gradient(s);
    ChannelBranches branches(parameters);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      const double *m = mean + 9 * c, *v = cov + 81 * c;
      double weight_grad[9], bias_grad, moved[9], slope[81], offset[9];
      (thin[c] ? careful_weight_gradient<STRIDE> : weight_gradient<STRIDE>)(
          s, g, y, x, c, gradient.x, gradient.g, m, weight_grad, &bias_grad);
      const float shift = dominant_mean(m, v);
      for (int u = 0; u < 9; ++u) moved[u] = m[u] - shift;
      branches.read(c);
      for (int64_t i = 0; i < parameters.norms; ++i) branches.var[i] = vars[i * s.channels + c];
      branches.backward(c, weight_grad, bias_grad, moved, v, number, grads, slope, offset);
      if (dx) gradient.channel(c, g, y, x, branches.weight, slope, offset, shift, dx);
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
    for (int64_t c = 0; c < s.channels; ++c)
      gradient.channel(c, g, y, x, weight + 9 * c, slope + 81 * c, offset + 9 * c, shift[c], dx);
  }
}

template <int STRIDE>
void all_moments(int threads, const Shape& s, const float* x, double* mean, double* cov) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 2);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) moments(s, x, c, plane, mean + 9 * c, cov + 81 * c);
  }
}

}  // namespace

extern "C" {

// A block in training: y, rectified on demand; μᵢ and vᵢ, (norms, C); and m (C, 9), C (C, 9, 9) and
// the channels that are summed in float64, (C), for the backward pass.
void depthwise_forward(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, int64_t kernels, int64_t norms, int64_t taps,
                       const double* eps, const float* const* tensors, int64_t relu, float* y,
                       double* means, double* vars, double* mean, double* cov, bool* thin) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? forward<1> : forward<2>)(threads, s, x, {kernels, norms, taps, eps, tensors},
                                          relu != 0, y, means, vars, mean, cov, thin);
}

// The gradients of its parameters and, unless dx is null, of its input; g counts behind the
// rectifier (y null: there is none).
void depthwise_backward(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                        int64_t stride, const float* g, const float* y, const float* x,
                        int64_t kernels, int64_t norms, int64_t taps, const double* eps,
                        const float* const* tensors, const double* vars, const double* mean,
                        const double* cov, const bool* thin, float* dx, float* const* grads) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? backward<1> : backward<2>)(threads, s, g, y, x, {kernels, norms, taps, eps, tensors},
                                            vars, mean, cov, thin, dx, grads);
}

// m (C, 9) and C (C, 9, 9) of the patches of x alone.
void depthwise_moments(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, double* mean, double* cov) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? all_moments<1> : all_moments<2>)(threads, s, x, mean, cov);
}

// ∂L/∂x alone, the part through the batch statistics included: slope S (C, 9, 9) and offset r (C, 9)
// of the patches less a shift (C).
void depthwise_input_grad(int threads, int64_t batch, int64_t channels, int64_t height,
                          int64_t width, int64_t stride, const float* g, const float* y,
                          const float* x, const float* shift, const double* weight,
                          const double* slope, const double* offset, float* dx) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? input_gradient<1> : input_gradient<2>)(threads, s, g, y, x, shift, weight, slope,
                                                       offset, dx);
}

}  // extern "C"
