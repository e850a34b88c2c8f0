// The small algebra of one channel of a depthwise block, in float64, for depthwise.cpp: algebra.py for
// J = 9 and O = 1.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr double THINNEST = 8.0;  // of moments to the variance made of them, from which sums are float64

// The branches of a block as PyTorch keeps them: kernels of the convolutions, then γ of all
// BatchNorms, then β of all. The last kernel may be 1×1; the skip, which has none, comes last.
struct Parameters {
  int64_t kernels, norms, taps;  // taps of the last kernel
  const double* eps;             // of each BatchNorm
  const float* const* tensors;
};

class ChannelBranches {
 public:
  explicit ChannelBranches(const Parameters& p)
      : var(p.norms), p_(p), kernels_(9 * p.norms), gamma_(p.norms), inverse_(p.norms) {}

  std::vector<double> var;  // vᵢ
  double weight[9];         // Ŵ

  void read(int64_t c) {
    std::fill(kernels_.begin(), kernels_.end(), 0.0);
    beta_ = 0.0;
    for (int64_t i = 0; i < p_.norms; ++i) {
      double* kernel = kernels_.data() + 9 * i;
      if (i == p_.kernels)
        kernel[4] = 1.0;
      else if (taps(i) == 1)
        kernel[4] = p_.tensors[i][c];
      else
        std::copy_n(p_.tensors[i] + 9 * c, 9, kernel);
      gamma_[i] = p_.tensors[p_.kernels + i][c];
      beta_ += p_.tensors[p_.kernels + p_.norms + i][c];
    }
  }

  // Whether some branch's variance is a small part of the moments that it is made of.
  bool ill_conditioned(const double* mean, const double* cov) const {
    for (int64_t i = 0; i < p_.kernels; ++i) {
      const double* kernel = kernels_.data() + 9 * i;
      double size = 0.0;
      for (int u = 0; u < 9; ++u) size += kernel[u] * kernel[u] * (mean[u] * mean[u] + cov[10 * u]);
      if (variance(kernel, cov) * THINNEST < size) return true;
    }
    return false;
  }

  // vᵢ from C, and with them Ŵ.
  void collapse(const double* cov) {
    for (int64_t i = 0; i < p_.norms; ++i) {
      const double v = variance(kernels_.data() + 9 * i, cov);
      var[i] = v < 0.0 ? 0.0 : v;
    }
    fold();
  }

  double bias(const double* m) const { return beta_ - dot(weight, m); }

  double mean(int64_t i, const double* m) const { return dot(kernels_.data() + 9 * i, m); }

  // Gradients of the branches from P = Σ g (x − m)ᵀ and q = Σ g; and what every patch receives
  // besides Ŵᵀg, S x + r, of patches with the mean m. Needs vᵢ.
  void backward(int64_t c, const double* weight_grad, double bias_grad, const double* mean,
                const double* cov, double number, float* const* grads, double* slope,
                double* offset) {
    fold();
    std::fill(slope, slope + 81, 0.0);
    for (int64_t i = 0; i < p_.norms; ++i) {
      const double* kernel = kernels_.data() + 9 * i;
      const double scale = gamma_[i] * inverse_[i], dscale = dot(weight_grad, kernel);
      const double dvar = -0.5 * dscale * scale * inverse_[i] * inverse_[i];
      for (int u = 0; u < 9; ++u)
        for (int v = 0; v < 9; ++v) slope[9 * u + v] += 2.0 * dvar / number * kernel[u] * kernel[v];
      grads[p_.kernels + i][c] = float(dscale * inverse_[i]);
      grads[p_.kernels + p_.norms + i][c] = float(bias_grad);
      for (int u = 0; i < p_.kernels && u < 9; ++u) {
        const float value = float(scale * weight_grad[u] + 2.0 * dvar * dot(kernel, cov + 9 * u));
        if (taps(i) == 9)
          grads[i][9 * c + u] = value;
        else if (u == 4)
          grads[i][c] = value;
      }
    }
    for (int u = 0; u < 9; ++u)
      offset[u] = -weight[u] * bias_grad / number - dot(slope + 9 * u, mean);
  }

 private:
  void fold() {
    std::fill(weight, weight + 9, 0.0);
    for (int64_t i = 0; i < p_.norms; ++i) {
      inverse_[i] = 1.0 / std::sqrt(var[i] + p_.eps[i]);
      for (int u = 0; u < 9; ++u) weight[u] += gamma_[i] * inverse_[i] * kernels_[9 * i + u];
    }
  }

  static double dot(const double* a, const double* b) {
    double sum = 0.0;
    for (int u = 0; u < 9; ++u) sum += a[u] * b[u];
    return sum;
  }

  static double variance(const double* kernel, const double* cov) {
    double sum = 0.0;
    for (int u = 0; u < 9; ++u)
      if (kernel[u] != 0.0) sum += kernel[u] * dot(kernel, cov + 9 * u);
    return sum;
  }

  int64_t taps(int64_t i) const { return i + 1 == p_.kernels ? p_.taps : 9; }

  Parameters p_;
  std::vector<double> kernels_, gamma_, inverse_;
  double beta_ = 0.0;
};

}  // namespace
