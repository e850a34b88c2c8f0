// The input gradient of a collapsed depthwise block, for depthwise.cpp.

#pragma once

#include <cstdint>
#include <vector>

#include "planes.h"

namespace {

// The offsets u ∈ {−1, 0, 1} at which patches along one axis cover input q, as bits u + 1.
template <int STRIDE>
int covering(int64_t q, int64_t outputs) {
  int set = 0;
  for (int u = -1; u <= 1; ++u) {
    const int64_t p = q - u;
    if (p >= 0 && p % STRIDE == 0 && p / STRIDE < outputs) set |= 1 << (u + 1);
  }
  return set;
}

// ∂L/∂x of a row that patches cover at the row offsets U: x receives, from the patches that cover
// it at u, Ŵ_u g + r_u + Σ_v S_uv x_v, which makes 5×5 taps on x, T_d = Σ_{u ∈ U} S_{u,u+d}.
template <int STRIDE>
struct RowGradient {
  struct Phase {  // of the columns first, first + STRIDE, …
    Differences x;
    TapList g;
    float constant = 0.0f;
  };
  struct Edge {  // what the patches beyond the left or right border would have added
    double kernel[5] = {};
    double constant = 0.0;
  };
  int set = 0;
  Phase phases[STRIDE];
  Edge left, right;

  RowGradient() = default;
  RowGradient(int rows, const double* weight, const double* slope, const double* offset, float shift,
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
      phases[first].x.middle = x.at(2, first) - x.at(2, 0);
      for (int d = 0; d < 25; ++d)
        if (kernel[d] != 0.0)
          phases[first].x.add(x.at(d / 5, first + d % 5 - 2) - x.at(2, 0), kernel[d]);
      phases[first].constant = float(constant);
    }
    for (int u = 0; u < 3; ++u) {
      if (!(rows >> u & 1)) continue;
      left.constant += offset[3 * u + 2];
      right.constant += offset[3 * u];
      for (int v = 0; v < 9; ++v) {
        const double from_left = slope[9 * (3 * u + 2) + v], from_right = slope[9 * (3 * u) + v];
        // of a patch beyond the border one column lies inside, and the others see padding
        if (v % 3 == 2)
          left.kernel[v / 3 - u + 2] += from_left;
        else
          left.constant -= shift * from_left;
        if (v % 3 == 0)
          right.kernel[v / 3 - u + 2] += from_right;
        else
          right.constant -= shift * from_right;
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
      : x(s.height, s.width, 2), g(s.out_height, s.out_width, 1), s_(s),
        row_(s.width / STRIDE + 1 + LANES) {}

  Padded<STRIDE> x;  // planes to work in
  Padded<1> g;

  // ∂L/∂x of a channel, from the slope S (9×9), the offset r (9) and the weight Ŵ (9); r is that of
  // planes less the shift.
  void channel(int64_t c, const float* slopes, const float* y, const float* images,
               const double* weight, const double* slope, const double* offset, float shift,
               float* dx) {
    prepare(weight, slope, offset, shift);
    for (int64_t n = 0; n < s_.batch; ++n) {
      const int64_t in = (n * s_.channels + c) * s_.in_size();
      const int64_t out = (n * s_.channels + c) * s_.out_size();
      x.fill(images + in, shift);
      g.fill_rectified(slopes + out, y ? y + out : nullptr);
      for (int64_t r = 0; r < s_.height; ++r) row(r, dx + in + r * s_.width);
    }
  }

 private:
  void prepare(const double* weight, const double* slope, const double* offset, float shift) {
    known_ = 0;
    for (int64_t r : {int64_t(0), int64_t(1), s_.height - 2, s_.height - 1}) {
      if (r < 0 || r >= s_.height) continue;
      const int set = covering<STRIDE>(r, s_.out_height);
      if (!(known_ >> set & 1)) by_set_[set] = {set, weight, slope, offset, shift, x, g};
      known_ |= 1 << set;
    }
  }

  void row(int64_t r, float* dx) {
    const RowGradient<STRIDE>& how = by_set_[covering<STRIDE>(r, s_.out_height)];
    const float *from = x.at(r, 0), *slopes = g.at(r / STRIDE, 0);
    for (int64_t first = 0; first < STRIDE && first < s_.width; ++first) {
      const auto& phase = how.phases[first];
      const int64_t n = (s_.width - first + STRIDE - 1) / STRIDE;
      float* to = STRIDE == 1 ? dx : row_.data();
      combine_row(phase.x, from, phase.g, slopes, phase.constant, n,
                  [&](const V& v, int64_t i) { store_part(to, v, i, n); });
      if (STRIDE > 1)
        for (int64_t i = 0; i < n; ++i) dx[first + i * STRIDE] = to[i];
    }
    if (STRIDE == 1) dx[0] -= edge(how.left, r, 0);
    if (STRIDE == 1 || s_.width % 2 == 0) dx[s_.width - 1] -= edge(how.right, r, s_.width - 1);
  }

  float edge(const typename RowGradient<STRIDE>::Edge& edge, int64_t r, int64_t q) {
    double sum = edge.constant;
    for (int d = 0; d < 5; ++d) sum += edge.kernel[d] * *x.at(r + d - 2, q);
    return float(sum);
  }

  Shape s_;
  std::vector<float> row_;
  RowGradient<STRIDE> by_set_[8];
  int known_ = 0;
};

}  // namespace
