// Vectors, zero-padded planes, and rows of weighted sums of taps, for depthwise.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
// Values summed in float32 before they join float64 totals: a variance of a smooth plane may be a
// small difference of large moments, so that sums of thousands are too rough.
constexpr int64_t CHUNK = 256;

typedef float V __attribute__((vector_size(LANES * sizeof(float))));
typedef double Wide __attribute__((vector_size(LANES * sizeof(double))));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, const V& v) { std::memcpy(p, &v, sizeof v); }

// Move N float32 sums to their float64 totals.
template <int N>
inline void drain(V (&sums)[N], Wide (&totals)[N]) {
#pragma GCC unroll 16
  for (int k = 0; k < N; ++k) totals[k] += __builtin_convertvector(sums[k], Wide), sums[k] = V{};
}

inline double total(const Wide& v) {
  double sum = 0.0;
  for (int i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// What a rectifier lets through: g where y > 0 (and where y is not a number, as PyTorch does).
inline float masked(float g, float y) { return y <= 0.0f ? 0.0f : g; }

// A depthwise 3×3 convolution with padding 1 of planes H×W; the stride is a template argument.
struct Shape {
  int64_t batch, channels, height, width, out_height, out_width;
  Shape(int64_t n, int64_t c, int64_t h, int64_t w, int64_t stride)
      : batch(n), channels(c), height(h), width(w), out_height((h - 1) / stride + 1),
        out_width((w - 1) / stride + 1) {}
  int64_t in_size() const { return height * width; }
  int64_t out_size() const { return out_height * out_width; }
};

// A zero-padded plane whose columns are split by their remainder modulo the stride, so that the
// taps of neighboring outputs are neighbors in memory. Rows have room for loads past their end.
template <int STRIDE, typename T = float>
struct Padded {
  int64_t height, width, margin, phase;
  T origin = T(0);
  std::vector<T> data;

  Padded(int64_t h, int64_t w, int64_t m)
      : height(h), width(w), margin(m), phase((w + 2 * m) / STRIDE + 5 * LANES),
        data((h + 2 * m + 1) * phase * STRIDE, T(0)) {}

  T* at(int64_t r, int64_t q) {  // r, q >= -margin
    const int64_t c = q + margin;
    return data.data() + (r + margin) * phase * STRIDE + (c % STRIDE) * phase + c / STRIDE;
  }

  // The plane less a shift; the padding is still that of the plane itself.
  void fill(const float* plane, T shift = T(0)) {
    if (shift != origin) std::fill(data.begin(), data.end(), -(origin = shift));
    for (int64_t r = 0; r < height; ++r, plane += width)
      for (int64_t first = 0; first < STRIDE; ++first) {
        T* to = at(r, first);
        for (int64_t i = 0; first + i * STRIDE < width; ++i)
          to[i] = T(plane[first + i * STRIDE]) - shift;
      }
  }

  // g, or g where y > 0.
  void fill_rectified(const float* g, const float* y) {
    if (!y) return fill(g);
    for (int64_t r = 0; r < height; ++r, g += width, y += width) {
      T* to = at(r, 0);
      for (int64_t i = 0; i < width; ++i) to[i] = masked(g[i], y[i]);
    }
  }
};

// One product of a coefficient and a row, shifted by `offset` from the row's base.
struct Tap {
  int64_t offset;
  float coefficient;
};

struct TapList {
  int count = 0;
  Tap taps[25] = {};
  void add(int64_t offset, double coefficient) { taps[count++] = {offset, float(coefficient)}; }
};

// A weighted sum of pixels as differences from the one in the middle: where pixels are nearly equal
// and the weights nearly cancel, neither rounds. `whole` is the sum of the weights.
struct Differences {
  TapList list;
  int64_t middle = 0;
  double whole = 0.0;
  void add(int64_t offset, double coefficient) {
    whole += coefficient;
    if (offset != middle) list.add(offset, coefficient);
  }
};

// Σ coefficient · row of M neighboring vectors, added to them.
template <int M>
inline void add_taps(const TapList& list, const float* from, V (&sums)[M]) {
  for (int t = 0; t < list.count; ++t) {
    const float* row = from + list.taps[t].offset;
    const V coefficient = V{} + list.taps[t].coefficient;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] += coefficient * load(row + m * LANES);
  }
}

template <int M>
inline void add_taps(const Differences& sum, const float* from, V (&sums)[M]) {
  V middle[M];
  const V whole = V{} + float(sum.whole);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    middle[m] = load(from + sum.middle + m * LANES);
    sums[m] += whole * middle[m];
  }
  for (int t = 0; t < sum.list.count; ++t) {
    const float* row = from + sum.list.taps[t].offset;
    const V coefficient = V{} + sum.list.taps[t].coefficient;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] += coefficient * (load(row + m * LANES) - middle[m]);
  }
}

// constant + the taps on x and on g, for whole steps of M vectors; returns where it stopped.
template <int M, typename Put>
inline int64_t combine(const Differences& x_taps, const float* x, const TapList& g_taps,
                       const float* g, float constant, int64_t i, int64_t count, Put put) {
  for (; i + (M - 1) * LANES < count; i += M * LANES) {
    V sums[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] = V{} + constant;
    add_taps<M>(x_taps, x + i, sums);
    add_taps<M>(g_taps, g + i, sums);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) put(sums[m], i + m * LANES);
  }
  return i;
}

// A whole row of `count` sums, given to `put(vector, position)`.
template <typename Put>
inline void combine_row(const Differences& x_taps, const float* x, const TapList& g_taps,
                        const float* g, float constant, int64_t count, Put put) {
  int64_t i = combine<4>(x_taps, x, g_taps, g, constant, 0, count, put);
  i = combine<2>(x_taps, x, g_taps, g, constant, i, count, put);
  combine<1>(x_taps, x, g_taps, g, constant, i, count, put);
}

// Write the lanes of v that lie before `count`.
inline void store_part(float* row, const V& v, int64_t at, int64_t count) {
  if (at + LANES <= count)
    store(row + at, v);
  else
    std::memcpy(row + at, &v, (count - at) * sizeof(float));
}

}  // namespace
