// CPU kernels around the matrix products of collapsed pointwise blocks: float32, NCHW planes of
// `size` pixels. Names follow docs/collapsed-training.md. Compiled and loaded by native.py; plain C
// symbols, no PyTorch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t CHUNK = 4096;  // values summed in float32 before they join a float64 total
constexpr double FAR = 16.0;     // mean² / variance from which moments are taken again in float64

// What a rectifier lets through: g where y > 0 (and where y is not a number, as PyTorch does).
inline float masked(float g, float y) { return y <= 0.0f ? 0.0f : g; }

// Mean and variance of one channel in float64, about the mean.
void careful_moments(int64_t batch, int64_t step, int64_t size, const float* x, double* mean,
                     double* var) {
  const double count = double(batch) * size;
  double sum = 0.0, square = 0.0;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t i = 0; i < size; ++i) sum += x[n * step + i];
  *mean = sum / count;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t i = 0; i < size; ++i) {
      const double d = x[n * step + i] - *mean;
      square += d * d;
    }
  *var = square / count;
}

}  // namespace

extern "C" {

// Mean and biased variance (C) of x (N, C, size).
void channel_moments(int threads, int64_t batch, int64_t channels, int64_t size, const float* x,
                     double* mean, double* var) {
  const double count = double(batch) * size;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, square = 0.0;
    for (int64_t n = 0; n < batch; ++n) {
      const float* plane = x + (n * channels + c) * size;
      for (int64_t first = 0; first < size; first += CHUNK) {
        const int64_t last = std::min(first + CHUNK, size);
        float s = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : s, q)
        for (int64_t i = first; i < last; ++i) s += plane[i], q += plane[i] * plane[i];
        sum += s;
        square += q;
      }
    }
    mean[c] = sum / count;
    var[c] = square / count - mean[c] * mean[c];
    if (!(mean[c] * mean[c] <= FAR * var[c]) || !std::isfinite(square))
      careful_moments(batch, channels * size, size, x + c * size, mean + c, var + c);
  }
}

// y = a z + c x + b, rectified on demand; x and c may be null. y may be z.
void affine(int threads, int64_t batch, int64_t channels, int64_t size, const float* z,
            const float* x, const float* a, const float* c, const float* b, int64_t relu, float* y) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < batch * channels; ++p) {
    const float ap = a[p % channels], bp = b[p % channels], cp = x ? c[p % channels] : 0.0f;
    const float *zp = z + p * size, *xp = x + p * size;
    const float floor = relu ? 0.0f : -INFINITY;
    float* yp = y + p * size;
    if (x) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float v = ap * zp[i] + cp * xp[i] + bp;
        yp[i] = v < floor ? floor : v;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float v = ap * zp[i] + bp;
        yp[i] = v < floor ? floor : v;
      }
    }
  }
}

// Σ g, Σ g (z − μ_z) and Σ g (x − μ_x) a channel, sums (3, C), of the gradient g behind the
// rectifier (y null: there is none); x may be null.
void gradient_sums(int threads, int64_t batch, int64_t channels, int64_t size, const float* g,
                   const float* y, const float* z, const float* x, const float* mean_z,
                   const float* mean_x, double* sums) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    double total[3] = {};
    const float mz = mean_z[c], mx = x ? mean_x[c] : 0.0f;
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t first = 0; first < size; first += CHUNK) {
        const int64_t at = (n * channels + c) * size + first, count = std::min(CHUNK, size - first);
        const float *gp = g + at, *zp = z + at, *yp = y ? y + at : nullptr;
        const float* xp = x ? x + at : zp;
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f;
        if (y) {
#pragma omp simd reduction(+ : s0, s1, s2)
          for (int64_t i = 0; i < count; ++i) {
            const float m = masked(gp[i], yp[i]);
            s0 += m, s1 += m * (zp[i] - mz), s2 += m * (xp[i] - mx);
          }
        } else {
#pragma omp simd reduction(+ : s0, s1, s2)
          for (int64_t i = 0; i < count; ++i)
            s0 += gp[i], s1 += gp[i] * (zp[i] - mz), s2 += gp[i] * (xp[i] - mx);
        }
        total[0] += s0, total[1] += s1, total[2] += s2;
      }
    for (int k = 0; k < 3; ++k) sums[k * channels + c] = total[k];
  }
}

// a g + s z + r into `to`, or added to it; g counts behind the rectifier (y null: there is none).
void affine_grad(int threads, int64_t batch, int64_t channels, int64_t size, const float* g,
                 const float* y, const float* z, const float* a, const float* s, const float* r,
                 int64_t accumulate, float* to) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < batch * channels; ++p) {
    const float ap = a[p % channels], sp = s[p % channels], rp = r[p % channels];
    const float *gp = g + p * size, *zp = z + p * size, *yp = y ? y + p * size : nullptr;
    float* out = to + p * size;
    if (accumulate && y) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] += ap * masked(gp[i], yp[i]) + sp * zp[i] + rp;
    } else if (y) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = ap * masked(gp[i], yp[i]) + sp * zp[i] + rp;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i)
        out[i] = (accumulate ? out[i] : 0.0f) + ap * gp[i] + sp * zp[i] + rp;
    }
  }
}

}  // extern "C"
