// First and second moments of the 3×3 patches of a channel, for depthwise.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "planes.h"

namespace {

constexpr double FAR = 16.0;  // mean² / variance from which moments are taken about the mean

// Sums of x_u (sums) and of x_u x_v (products, 9×9) over the patches of one channel.
// Stride 1: all patches see all pixels but those that the border cuts off, so that a product of taps
// u, v is the correlation R_d of the plane with itself at d = v − u, less the border's share.
struct Correlations {
  // R_d for d = (0, 0…2), (1, −2…2), (2, −2…2) and the plain sum
  Wide plane[14] = {};
  // along the border: rows 0, H−1 at d = 0…2, columns 0, W−1 likewise
  double line[4][3] = {}, line_sum[4] = {}, corner[4] = {}, corner_sum[4] = {};

  void add(Padded<1>& x) {
    const int64_t h = x.height, w = x.width;
    V acc[14] = {};
    int64_t pending = 0;
    for (int64_t r = 0; r < h; ++r) {
      const float *p0 = x.at(r, 0), *p1 = x.at(r + 1, -2), *p2 = x.at(r + 2, -2);
      for (int64_t i = 0; i < w; i += LANES) {
        const V here = load(p0 + i);
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d) acc[d] += here * load(p0 + i + d);
#pragma GCC unroll 5
        for (int d = 0; d < 5; ++d) acc[3 + d] += here * load(p1 + i + d);
#pragma GCC unroll 5
        for (int d = 0; d < 5; ++d) acc[8 + d] += here * load(p2 + i + d);
        acc[13] += here;
      }
      if ((pending += w) >= CHUNK) drain(acc, plane), pending = 0;
    }
    drain(acc, plane);
    const int64_t step = x.phase;
    add_line(0, x.at(0, 0), 1, w);
    add_line(1, x.at(h - 1, 0), 1, w);
    add_line(2, x.at(0, 0), step, h);
    add_line(3, x.at(0, w - 1), step, h);
    for (int k = 0; k < 4; ++k) {
      const double value = *x.at(k / 2 ? h - 1 : 0, k % 2 ? w - 1 : 0);
      corner[k] += value * value, corner_sum[k] += value;
    }
  }

  void write(double* sums, double* products) const {
    double all[14];
    for (int d = 0; d < 14; ++d) all[d] = total(plane[d]);
    for (int u = 0; u < 9; ++u) {
      sums[u] = all[13];
      // tap u = +1 never sees row (column) 0 from inside, u = −1 never the last one
      const int row = lost(u / 3, 0), column = lost(u % 3, 2);
      if (row >= 0) sums[u] -= line_sum[row];
      if (column >= 0) sums[u] -= line_sum[column];
      if (row >= 0 && column >= 0) sums[u] += corner_sum[2 * row + column - 2];
      for (int v = 0; v < 9; ++v) {
        int dr = v / 3 - u / 3, dc = v % 3 - u % 3;
        if (dr < 0 || (dr == 0 && dc < 0)) dr = -dr, dc = -dc;
        double value = all[dr == 0 ? dc : 5 * dr + dc];
        // a product is lost only where both taps are inside, which needs d = 0 across the border
        if (row >= 0 && v / 3 == u / 3) value -= line[row][std::abs(dc)];
        if (column >= 0 && v % 3 == u % 3) value -= line[column][dr];
        if (row >= 0 && column >= 0 && u == v) value += corner[2 * row + column - 2];
        products[9 * u + v] = value;
      }
    }
  }

 private:
  static int lost(int tap, int first) { return tap == 2 ? first : tap == 0 ? first + 1 : -1; }

  void add_line(int which, const float* p, int64_t step, int64_t count) {
    double s[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const double here = p[i * step];
      s[3] += here;
      for (int d = 0; d < 3; ++d) s[d] += here * p[(i + d) * step];
    }
    for (int d = 0; d < 3; ++d) line[which][d] += s[d];
    line_sum[which] += s[3];
  }
};

// Stride 2: every product is summed by itself; there are a quarter as many patches.
struct Products {
  Wide sum[9] = {}, product[45] = {};

  template <int U>
  void add_tap(Padded<2>& x, int64_t ho, int64_t wo, const V& valid) {
    constexpr int first = U * 9 - U * (U - 1) / 2;
    constexpr int count = 9 - U;  // of products, and then the sum
    V acc[count + 1] = {};
    Wide totals[count + 1] = {};
    int64_t pending = 0;
    for (int64_t r = 0; r < ho; ++r) {
      const float* tap[9];
#pragma GCC unroll 9
      for (int v = U; v < 9; ++v) tap[v] = x.at(2 * r + v / 3 - 1, v % 3 - 1);
      for (int64_t i = 0; i < wo; i += LANES) {
        V here = load(tap[U] + i);
        if (i + LANES > wo) here *= valid;
        acc[count] += here;
#pragma GCC unroll 9
        for (int v = U; v < 9; ++v) acc[v - U] += here * load(tap[v] + i);
      }
      if ((pending += wo) >= CHUNK) drain(acc, totals), pending = 0;
    }
    drain(acc, totals);
    for (int v = 0; v < count; ++v) product[first + v] += totals[v];
    sum[U] += totals[count];
  }

  template <int... U>
  void add_taps(Padded<2>& x, int64_t ho, int64_t wo, const V& valid,
                std::integer_sequence<int, U...>) {
    (add_tap<U>(x, ho, wo, valid), ...);
  }

  void add(Padded<2>& x) {
    const int64_t ho = (x.height - 1) / 2 + 1, wo = (x.width - 1) / 2 + 1;
    V valid;  // lanes of a row's last vector
    for (int i = 0; i < LANES; ++i) valid[i] = i < (wo - 1) % LANES + 1 ? 1.0f : 0.0f;
    add_taps(x, ho, wo, valid, std::make_integer_sequence<int, 9>());
  }

  void write(double* sums, double* products) const {
    for (int u = 0; u < 9; ++u) sums[u] = total(sum[u]);
    for (int u = 0, p = 0; u < 9; ++u)
      for (int v = u; v < 9; ++v, ++p) products[9 * u + v] = products[9 * v + u] = total(product[p]);
  }
};

// Mean and covariance of one channel's patches, in float64 and about a first estimate of the mean.
template <int STRIDE>
void careful_moments(const Shape& s, const float* x, int64_t c, double* mean, double* cov) {
  Padded<STRIDE, double> plane(s.height, s.width, 1);
  const double count = double(s.batch) * s.out_size();
  const double pixels = double(s.batch) * s.in_size();
  double shift = 0.0;
  for (int64_t n = 0; n < s.batch; ++n)
    for (const float *p = x + (n * s.channels + c) * s.in_size(), *end = p + s.in_size(); p < end; ++p)
      shift += *p / pixels;
  std::fill(mean, mean + 9, 0.0);
  std::fill(cov, cov + 81, 0.0);
  for (int64_t n = 0; n < s.batch; ++n) {
    plane.fill(x + (n * s.channels + c) * s.in_size(), shift);
    for (int64_t r = 0; r < s.out_height; ++r) {
      const double* tap[9];
      for (int u = 0; u < 9; ++u) tap[u] = plane.at(STRIDE * r + u / 3 - 1, u % 3 - 1);
      for (int u = 0; u < 9; ++u) {
        double sum = 0.0;
        for (int64_t i = 0; i < s.out_width; ++i) sum += tap[u][i];
        mean[u] += sum;
        for (int v = u; v < 9; ++v) {
          double product = 0.0;
          for (int64_t i = 0; i < s.out_width; ++i) product += tap[u][i] * tap[v][i];
          cov[9 * u + v] += product;
        }
      }
    }
  }
  for (int u = 0; u < 9; ++u) mean[u] /= count;
  for (int u = 0; u < 9; ++u)
    for (int v = u; v < 9; ++v)
      cov[9 * v + u] = cov[9 * u + v] = cov[9 * u + v] / count - mean[u] * mean[v];
  for (int u = 0; u < 9; ++u) mean[u] += shift;
}

// The same from short sums in float32, or in float64 about the mean where these would round.
template <int STRIDE>
void moments(const Shape& s, const float* x, int64_t c, Padded<STRIDE>& plane, double* mean,
             double* cov) {
  std::conditional_t<STRIDE == 1, Correlations, Products> sums;
  for (int64_t n = 0; n < s.batch; ++n) {
    plane.fill(x + (n * s.channels + c) * s.in_size());
    sums.add(plane);
  }
  sums.write(mean, cov);
  const double count = double(s.batch) * s.out_size();
  bool sound = true;
  for (int u = 0; u < 9; ++u) mean[u] /= count;
  for (int u = 0; u < 9; ++u)
    for (int w = 0; w < 9; ++w) {
      double& entry = cov[9 * u + w];
      sound = sound && std::isfinite(entry);
      entry = entry / count - mean[u] * mean[w];
    }
  for (int u = 0; u < 9; ++u) sound = sound && mean[u] * mean[u] <= FAR * cov[10 * u];
  if (!sound) careful_moments<STRIDE>(s, x, c, mean, cov);
}

}  // namespace
