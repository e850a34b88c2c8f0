// CPU kernels of collapsed depthwise 3×3 blocks: float32, NCHW, one task a channel, so that sums do not depend
// on the number of threads. Names follow docs/collapsed-training.md. Compiled and loaded by
// native.py; plain C symbols, no PyTorch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t CHUNK = 4096;  // values summed in float32 before they join a float64 total
constexpr double FAR = 16.0;     // mean² / variance from which moments are taken again in float64

typedef float V __attribute__((vector_size(LANES * sizeof(float))));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, const V& v) { std::memcpy(p, &v, sizeof v); }

inline double total(const V& v) {
  double sum = 0.0;
  for (int i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// What a rectifier lets through: g where y > 0 (and where y is not a number, as PyTorch does).
inline float masked(float g, float y) { return y <= 0.0f ? 0.0f : g; }

// ------------------------------------------------------------------ planes and rows

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
// taps of neighbouring outputs are neighbours in memory. Rows have room for loads past their end.
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

// Σ coefficient · row of M neighbouring vectors, added to them.
template <int M>
inline void add_taps(const TapList& list, const float* from, V (&sums)[M]) {
  for (int t = 0; t < list.count; ++t) {
    const float* row = from + list.taps[t].offset;
    const V coefficient = V{} + list.taps[t].coefficient;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] += coefficient * load(row + m * LANES);
  }
}

// constant + the taps on x and on g, for whole steps of M vectors; returns where it stopped.
template <int M, typename Put>
inline int64_t combine(const TapList& x_taps, const float* x, const TapList& g_taps,
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
inline void combine_row(const TapList& x_taps, const float* x, const TapList& g_taps,
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

// ------------------------------------------------------------------ moments of windows

// Sums of x_u (sums) and of x_u x_v (products, 9×9) over the windows of one channel.
// Stride 1: all windows see all pixels but those that the border cuts off, so that a product of taps
// u, v is the correlation R_d of the plane with itself at d = v − u, less the border's share.
struct Correlations {
  // R_d for d = (0, 0…2), (1, −2…2), (2, −2…2) and the plain sum, in float32 lanes
  V lanes[14] = {};
  // the same in float64, and along the border: rows 0, H−1 at d = 0…2, columns 0, W−1 likewise
  double plane[14] = {}, line[4][3] = {}, line_sum[4] = {}, corner[4] = {}, corner_sum[4] = {};

  void add(Padded<1>& x) {
    const int64_t h = x.height, w = x.width;
    V acc[14];
    std::copy(lanes, lanes + 14, acc);
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
    }
    std::copy(acc, acc + 14, lanes);
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

  void flush() {
    for (int d = 0; d < 14; ++d) plane[d] += total(lanes[d]), lanes[d] = V{};
  }

  void write(double* sums, double* products) const {
    for (int u = 0; u < 9; ++u) {
      sums[u] = plane[13];
      // tap u = +1 never sees row (column) 0 from inside, u = −1 never the last one
      const int row = lost(u / 3, 0), column = lost(u % 3, 2);
      if (row >= 0) sums[u] -= line_sum[row];
      if (column >= 0) sums[u] -= line_sum[column];
      if (row >= 0 && column >= 0) sums[u] += corner_sum[2 * row + column - 2];
      for (int v = 0; v < 9; ++v) {
        int dr = v / 3 - u / 3, dc = v % 3 - u % 3;
        if (dr < 0 || (dr == 0 && dc < 0)) dr = -dr, dc = -dc;
        double value = plane[dr == 0 ? dc : 5 * dr + dc];
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
    float s[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float here = p[i * step];
      s[3] += here;
      for (int d = 0; d < 3; ++d) s[d] += here * p[(i + d) * step];
    }
    for (int d = 0; d < 3; ++d) line[which][d] += s[d];
    line_sum[which] += s[3];
  }
};

// Stride 2: every product is summed by itself; there are a quarter as many windows.
struct Products {
  V sum[9] = {}, product[45] = {};
  double total_sum[9] = {}, total_product[45] = {};

  template <int U>
  void add_tap(Padded<2>& x, int64_t ho, int64_t wo, const V& valid) {
    constexpr int first = U * 9 - U * (U - 1) / 2;
    V own = sum[U], acc[9 - U];
    std::copy(product + first, product + first + 9 - U, acc);
    for (int64_t r = 0; r < ho; ++r) {
      const float* tap[9];
#pragma GCC unroll 9
      for (int v = U; v < 9; ++v) tap[v] = x.at(2 * r + v / 3 - 1, v % 3 - 1);
      for (int64_t i = 0; i < wo; i += LANES) {
        V here = load(tap[U] + i);
        if (i + LANES > wo) here *= valid;
        own += here;
#pragma GCC unroll 9
        for (int v = U; v < 9; ++v) acc[v - U] += here * load(tap[v] + i);
      }
    }
    sum[U] = own;
    std::copy(acc, acc + 9 - U, product + first);
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

  void flush() {
    for (int u = 0; u < 9; ++u) total_sum[u] += total(sum[u]), sum[u] = V{};
    for (int p = 0; p < 45; ++p) total_product[p] += total(product[p]), product[p] = V{};
  }

  void write(double* sums, double* products) const {
    std::copy(total_sum, total_sum + 9, sums);
    for (int u = 0, p = 0; u < 9; ++u)
      for (int v = u; v < 9; ++v, ++p) products[9 * u + v] = products[9 * v + u] = total_product[p];
  }
};

// Mean and covariance of one channel's windows, in float64 and about the mean.
template <int STRIDE>
void careful_moments(const Shape& s, const float* x, int64_t c, double* mean, double* cov) {
  Padded<STRIDE, double> plane(s.height, s.width, 1);
  const double count = double(s.batch) * s.out_size();
  std::fill(mean, mean + 9, 0.0);
  std::fill(cov, cov + 81, 0.0);
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t n = 0; n < s.batch; ++n) {
      plane.fill(x + (n * s.channels + c) * s.in_size());
      for (int64_t r = 0; r < s.out_height; ++r)
        for (int64_t q = 0; q < s.out_width; ++q) {
          double tap[9];
          for (int u = 0; u < 9; ++u)
            tap[u] = *plane.at(STRIDE * r + u / 3 - 1, STRIDE * q + u % 3 - 1);
          for (int u = 0; u < 9; ++u)
            if (pass == 0)
              mean[u] += tap[u] / count;
            else
              for (int v = 0; v < 9; ++v)
                cov[9 * u + v] += (tap[u] - mean[u]) * (tap[v] - mean[v]) / count;
        }
    }
}

template <int STRIDE, typename Sums>
void moments(int threads, const Shape& s, const float* x, double* mean, double* cov) {
  const double count = double(s.batch) * s.out_size();
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 2);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      Sums sums;
      int64_t pending = 0;
      for (int64_t n = 0; n < s.batch; ++n) {
        plane.fill(x + (n * s.channels + c) * s.in_size());
        sums.add(plane);
        if ((pending += s.out_size()) >= CHUNK) sums.flush(), pending = 0;
      }
      sums.flush();
      double *m = mean + 9 * c, *v = cov + 81 * c;
      sums.write(m, v);
      bool sound = true;
      for (int u = 0; u < 9; ++u) m[u] /= count;
      for (int u = 0; u < 9; ++u)
        for (int w = 0; w < 9; ++w) {
          double& entry = v[9 * u + w];
          sound = sound && std::isfinite(entry);
          entry = entry / count - m[u] * m[w];
        }
      for (int u = 0; u < 9; ++u) sound = sound && m[u] * m[u] <= FAR * v[10 * u];
      if (!sound) careful_moments<STRIDE>(s, x, c, m, v);
    }
  }
}

// ------------------------------------------------------------------ gradient of the input

// The offsets u ∈ {−1, 0, 1} at which windows along one axis cover input q, as bits u + 1.
template <int STRIDE>
int covering(int64_t q, int64_t outputs) {
  int set = 0;
  for (int u = -1; u <= 1; ++u) {
    const int64_t p = q - u;
    if (p >= 0 && p % STRIDE == 0 && p / STRIDE < outputs) set |= 1 << (u + 1);
  }
  return set;
}

// ∂L/∂x of a row that windows cover at the row offsets U: x receives, from the windows that cover
// it at u, Ŵ_u g + r_u + Σ_v S_uv x_v, which makes 5×5 taps on x, T_d = Σ_{u ∈ U} S_{u,u+d}.
template <int STRIDE>
struct RowGradient {
  struct Phase {  // of the columns first, first + STRIDE, …
    TapList x, g;
    float constant = 0.0f;
  };
  struct Edge {  // what the windows beyond the left or right border would have added
    double kernel[5] = {};
    double constant = 0.0;
  };
  int set = 0;
  Phase phases[STRIDE];
  Edge left, right;

  RowGradient() = default;
  RowGradient(int rows, const double* weight, const double* slope, const double* offset,
              Padded<STRIDE>& x, Padded<1>& g)
      : set(rows) {
    for (int first = 0; first < STRIDE; ++first) {
      const int columns = STRIDE == 1 ? 7 : first ? 5 : 2;
      double kernel[25] = {}, constant = 0.0;
      for (int u = 0; u < 9; ++u) {
        if (!(rows >> (u / 3) & 1) || !(columns >> (u % 3) & 1)) continue;
        constant += offset[u];
        for (int v = 0; v < 9; ++v)
          kernel[5 * (v / 3 - u / 3 + 2) + v % 3 - u % 3 + 2] += slope[9 * u + v];
        // the row of g, (r − u)/stride, is found from that of r rounded down
        const int64_t down = STRIDE == 1 ? 1 - u / 3 : u / 3 == 0;
        g_offset(phases[first].g, g, down, (first - u % 3 + 1) / STRIDE, weight[u]);
      }
      for (int d = 0; d < 25; ++d)
        if (kernel[d] != 0.0)
          phases[first].x.add(x.at(d / 5, first + d % 5 - 2) - x.at(2, 0), kernel[d]);
      phases[first].constant = float(constant);
    }
    for (int u = 0; u < 3; ++u) {
      if (!(rows >> u & 1)) continue;
      left.constant += offset[3 * u + 2];
      right.constant += offset[3 * u];
      for (int v = 0; v < 3; ++v) {
        left.kernel[v - u + 2] += slope[9 * (3 * u + 2) + 3 * v + 2];
        right.kernel[v - u + 2] += slope[9 * (3 * u) + 3 * v];
      }
    }
  }

 private:
  static void g_offset(TapList& taps, Padded<1>& g, int64_t row, int64_t column, double weight) {
    taps.add(g.at(row, column) - g.at(0, 0), weight);
  }
};

template <int STRIDE>
class InputGradient {
 public:
  explicit InputGradient(const Shape& s)
      : s_(s), x_(s.height, s.width, 2), g_(s.out_height, s.out_width, 1),
        row_(s.width / STRIDE + 1 + LANES) {}

  // The slope S (9×9), the offset r (9) and the weight Ŵ (9) of the channel whose planes follow.
  void prepare(const double* weight, const double* slope, const double* offset) {
    known_ = 0;
    for (int64_t r : {int64_t(0), int64_t(1), s_.height - 2, s_.height - 1}) {
      if (r < 0 || r >= s_.height) continue;
      const int set = covering<STRIDE>(r, s_.out_height);
      if (!(known_ >> set & 1)) by_set_[set] = {set, weight, slope, offset, x_, g_};
      known_ |= 1 << set;
    }
  }

  void plane(const float* g, const float* y, const float* x, float* dx) {
    x_.fill(x);
    g_.fill_rectified(g, y);
    for (int64_t r = 0; r < s_.height; ++r) row(r, dx + r * s_.width);
  }

 private:
  void row(int64_t r, float* dx) {
    const RowGradient<STRIDE>& how = by_set_[covering<STRIDE>(r, s_.out_height)];
    const float *x = x_.at(r, 0), *g = g_.at(r / STRIDE, 0);
    for (int64_t first = 0; first < STRIDE && first < s_.width; ++first) {
      const auto& phase = how.phases[first];
      const int64_t n = (s_.width - first + STRIDE - 1) / STRIDE;
      float* to = STRIDE == 1 ? dx : row_.data();
      combine_row(phase.x, x, phase.g, g, phase.constant, n,
                  [&](const V& v, int64_t i) { store_part(to, v, i, n); });
      if (STRIDE > 1)
        for (int64_t i = 0; i < n; ++i) dx[first + i * STRIDE] = to[i];
    }
    if (STRIDE == 1) dx[0] -= edge(how.left, r, 0);
    if (STRIDE == 1 || s_.width % 2 == 0) dx[s_.width - 1] -= edge(how.right, r, s_.width - 1);
  }

  float edge(const typename RowGradient<STRIDE>::Edge& edge, int64_t r, int64_t q) {
    float sum = float(edge.constant);
    for (int d = 0; d < 5; ++d) sum += float(edge.kernel[d]) * *x_.at(r + d - 2, q);
    return sum;
  }

  Shape s_;
  Padded<STRIDE> x_;
  Padded<1> g_;
  std::vector<float> row_;
  RowGradient<STRIDE> by_set_[8];
  int known_ = 0;
};

// ------------------------------------------------------------------ the passes

template <int STRIDE>
void forward(int threads, const Shape& s, const float* x, const float* shift,
             const double* weight, const double* bias, bool relu, float* y) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 1);
    const TapList none{};
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      TapList taps;
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

template <int STRIDE>
void weight_gradient(int threads, const Shape& s, const float* g, const float* y, const float* x,
                     const double* mean, double* weight_grad, double* bias_grad) {
#pragma omp parallel num_threads(threads)
  {
    Padded<STRIDE> plane(s.height, s.width, 1);
    Padded<1> slope(s.out_height, s.out_width, 0);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      double sums[10] = {};
      V acc[10] = {};
      float m[9];
      std::copy(mean + 9 * c, mean + 9 * c + 9, m);
      int64_t pending = 0;
      auto flush = [&] {
        for (int u = 0; u < 10; ++u) sums[u] += total(acc[u]), acc[u] = V{};
        pending = 0;
      };
      for (int64_t n = 0; n < s.batch; ++n) {
        const int64_t out = (n * s.channels + c) * s.out_size();
        plane.fill(x + (n * s.channels + c) * s.in_size());
        slope.fill_rectified(g + out, y ? y + out : nullptr);
        V own[10];
        std::copy(acc, acc + 10, own);
        for (int64_t r = 0; r < s.out_height; ++r) {
          const float *here = slope.at(r, 0), *tap[9];
          for (int u = 0; u < 9; ++u) tap[u] = plane.at(STRIDE * r + u / 3 - 1, u % 3 - 1);
          for (int64_t i = 0; i < s.out_width; i += LANES) {
            const V value = load(here + i);
#pragma GCC unroll 9
            for (int u = 0; u < 9; ++u) own[u] += value * (load(tap[u] + i) - m[u]);
            own[9] += value;
          }
        }
        std::copy(own, own + 10, acc);
        if ((pending += s.out_size()) >= CHUNK) flush();
      }
      flush();
      std::copy(sums, sums + 9, weight_grad + 9 * c);
      bias_grad[c] = sums[9];
    }
  }
}

template <int STRIDE>
void input_gradient(int threads, const Shape& s, const float* g, const float* y, const float* x,
                    const double* weight, const double* slope, const double* offset, float* dx) {
#pragma omp parallel num_threads(threads)
  {
    InputGradient<STRIDE> gradient(s);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.channels; ++c) {
      gradient.prepare(weight + 9 * c, slope + 81 * c, offset + 9 * c);
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

// m (C, 9) and C (C, 9, 9) of the windows of x.
void depthwise_moments(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, double* mean, double* cov) {
  const Shape s(batch, channels, height, width, stride);
  if (stride == 1)
    moments<1, Correlations>(threads, s, x, mean, cov);
  else
    moments<2, Products>(threads, s, x, mean, cov);
}

// y = Ŵ ∗ (x − shift) + b̂, rectified on demand; weight (C, 9), shift and bias (C).
void depthwise_forward(int threads, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t stride, const float* x, const float* shift, const double* weight,
                       const double* bias, int64_t relu, float* y) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? forward<1> : forward<2>)(threads, s, x, shift, weight, bias, relu != 0, y);
}

// Σ g (x − m) (C, 9) and Σ g (C) over the windows, g behind the rectifier (y null: there is none).
void depthwise_weight_grad(int threads, int64_t batch, int64_t channels, int64_t height,
                           int64_t width, int64_t stride, const float* g, const float* y,
                           const float* x, const double* mean, double* weight_grad,
                           double* bias_grad) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? weight_gradient<1> : weight_gradient<2>)(threads, s, g, y, x, mean,
                                                         weight_grad, bias_grad);
}

// ∂L/∂x, the part through the batch statistics included: slope S (C, 9, 9), offset r (C, 9).
void depthwise_input_grad(int threads, int64_t batch, int64_t channels, int64_t height,
                          int64_t width, int64_t stride, const float* g, const float* y,
                          const float* x, const double* weight, const double* slope,
                          const double* offset, float* dx) {
  const Shape s(batch, channels, height, width, stride);
  (stride == 1 ? input_gradient<1> : input_gradient<2>)(threads, s, g, y, x, weight, slope, offset,
                                                       dx);
}

}  // extern "C"
