// The small algebra of the Gram form on a CPU, in float32 or float64: algebra.py in one call a pass.
// Names follow docs/collapsed-training.md. Compiled and loaded by cpu_build.py; plain C symbols, no
// PyTorch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t DEPTH = 512;  // rows that are multiplied while they are in the second-level cache

// A block's branches: kernels of the convolutions, then γ of all BatchNorms, then β of all. The last
// kernel may have one tap a channel of `area`; the skip, which has none, comes last.
struct Block {
  int64_t groups, outputs, patch, area, kernels, norms, taps;
  const double* eps;
  const float* const* tensors;

  int64_t all() const { return groups * outputs; }
  int64_t center(int64_t channel) const { return channel * area + area / 2; }
  bool narrow(int64_t i) const { return i + 1 == kernels && taps < patch; }
  float gamma(int64_t i, int64_t row) const { return tensors[kernels + i][row]; }
  float beta(int64_t i, int64_t row) const { return tensors[kernels + norms + i][row]; }

  // Row `row` of G · O of kernel i, in full.
  template <typename T>
  void read(int64_t i, int64_t row, T* to) const {
    const float* from = tensors[i] + row * (narrow(i) ? taps : patch);
    if (!narrow(i)) return void(std::copy(from, from + patch, to));
    std::fill(to, to + patch, T(0));
    for (int64_t c = 0; c < taps; ++c) to[center(c)] = from[c];
  }

  void write(int64_t i, int64_t row, int64_t entry, float value, float* const* to) const {
    if (!narrow(i))
      to[i][row * patch + entry] = value;
    else if (entry % area == area / 2)
      to[i][row * taps + entry / area] = value;
  }
};

// Columns of a matrix (rows, columns) as panels of WIDTH next to each other: what tiles multiply with.
template <typename T>
void pack(const T* from, int64_t rows, int64_t columns, int64_t first, T* to) {
  const int64_t count = std::min(WIDTH<T>, columns - first);
  for (int64_t k = 0; k < rows; ++k, to += WIDTH<T>) {
    std::copy_n(from + k * columns + first, count, to);
    std::fill(to + count, to + WIDTH<T>, T(0));
  }
}

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += 64) {
    T part = 0;
    for (int64_t k = first; k < std::min(count, first + 64); ++k) part += a[k] * b[k];
    sum += part;
  }
  return sum;
}

// The kernels of a block in T, one row a branch and output, and their products with C (G, J, J).
template <typename T>
class Kernels {
 public:
  explicit Kernels(const Block& block)
      : b_(block), rows_(b_.kernels * b_.outputs), panels_((b_.patch + WIDTH<T> - 1) / WIDTH<T>),
        tall_(b_.groups * rows_ * b_.patch), cov_(b_.groups * panels_ * b_.patch * WIDTH<T>) {}

  const T* row(int64_t g, int64_t i, int64_t o) const {
    return tall_.data() + ((g * b_.kernels + i) * b_.outputs + o) * b_.patch;
  }

  // Called by all threads.
  void read(const T* cov) {
    const int64_t size = b_.patch * b_.patch;
#pragma omp for collapse(3) schedule(static) nowait
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t i = 0; i < b_.kernels; ++i)
        for (int64_t o = 0; o < b_.outputs; ++o)
          b_.read(i, g * b_.outputs + o, const_cast<T*>(row(g, i, o)));
#pragma omp for collapse(2) schedule(static)
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t p = 0; p < panels_; ++p)
        pack(cov + g * size, b_.patch, b_.patch, p * WIDTH<T>,
             cov_.data() + (g * panels_ + p) * b_.patch * WIDTH<T>);
  }

  // Give `use` rows of W C, WIDTH entries at a time: (g, i, o, first entry, entries, values).
  template <typename Use>
  void multiply_covariance(Use use) const {
    const int64_t tiles = (rows_ + ROWS - 1) / ROWS;
    Aligned<T> left(b_.patch * ROWS), values(ROWS * WIDTH<T>);
#pragma omp for collapse(2) schedule(static)
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * ROWS, end = std::min(rows_, first + ROWS);
        for (int64_t r = first; r < end; ++r)
          for (int64_t k = 0; k < b_.patch; ++k)
            left.data()[k * ROWS + r - first] = tall_.data()[(g * rows_ + r) * b_.patch + k];
        for (int64_t p = 0; p < panels_; ++p) {
          multiply(b_.patch, left.data(), cov_.data() + (g * panels_ + p) * b_.patch * WIDTH<T>,
                   values.data());
          for (int64_t r = first; r < end; ++r)
            use(g, r / b_.outputs, r % b_.outputs, p * WIDTH<T>,
                std::min(WIDTH<T>, b_.patch - p * WIDTH<T>),
                values.data() + (r - first) * WIDTH<T>);
        }
      }
  }

  // S (G, J, J) = Σ weight · w wᵀ over the rows w, weighted (kernels, G, O); a symmetric matrix.
  void weighted_gram(const T* weights, T* to) const {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t p = panels_ - 1; p >= 0; --p) {
        const int64_t begin = p * WIDTH<T>, end = std::min(b_.patch, begin + WIDTH<T>);
        const int64_t tiles = (end + ROWS - 1) / ROWS, depth = std::min(rows_, DEPTH);
        Aligned<T> right(depth * WIDTH<T>), left(depth * ROWS), sums(tiles * ROWS * WIDTH<T>);
        for (int64_t first = 0; first < rows_; first += depth) {
          const int64_t count = std::min(depth, rows_ - first);
          const T* rows = tall_.data() + (g * rows_ + first) * b_.patch;
          pack(rows, count, b_.patch, begin, right.data());
          for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int64_t k = 0; k < count; ++k) {
              const int64_t i = (first + k) / b_.outputs, o = (first + k) % b_.outputs;
              const T weight = weights[i * b_.all() + g * b_.outputs + o];
              for (int64_t j = 0; j < ROWS; ++j) {
                const int64_t at = tile * ROWS + j;
                left.data()[k * ROWS + j] = at < end ? weight * rows[k * b_.patch + at] : T(0);
              }
            }
            multiply(count, left.data(), right.data(), sums.data() + tile * ROWS * WIDTH<T>,
                     first > 0);
          }
        }
        T* slope = to + g * b_.patch * b_.patch;
        for (int64_t j = 0; j < end; ++j)
          for (int64_t k = std::max(j, begin); k < end; ++k)
            slope[j * b_.patch + k] = slope[k * b_.patch + j] = sums.data()[j * WIDTH<T> + k - begin];
      }
  }

 private:
  const Block& b_;
  int64_t rows_, panels_;
  Aligned<T> tall_, cov_;
};

// v, the part of the patches' variance that a row explains, and what its weights could make of it.
struct Row {
  double var, explained, size;
};

template <typename T>
void collapse(int threads, const Block& b, const double* mean, const double* moved, const T* cov,
              double* means, double* vars, double* sizes, double* explained, T* weight, T* bias,
              T* scale) {
  Kernels<T> kernels(b);
  std::vector<Row> rows(b.kernels * b.all());
#pragma omp parallel num_threads(threads)
  {
    kernels.read(cov);
    kernels.multiply_covariance([&](int64_t g, int64_t i, int64_t o, int64_t first, int64_t count,
                                    const T* product) {
      Row& row = rows[i * b.all() + g * b.outputs + o];
      const T *kernel = kernels.row(g, i, o) + first, *own = cov + g * b.patch * b.patch;
      row.var += dot(product, kernel, count);
      row.explained += dot(product, product, count);
      for (int64_t k = 0; k < count; ++k)
        row.size += double(kernel[k] * kernel[k]) * own[(first + k) * (b.patch + 1)];
    });
#pragma omp for collapse(2) schedule(static)
    for (int64_t g = 0; g < b.groups; ++g)
      for (int64_t o = 0; o < b.outputs; ++o) {
        const int64_t at = g * b.outputs + o, skipped = b.center(o);
        const double *m = mean + g * b.patch, *origin = moved + g * b.patch;
        T* w = weight + at * b.patch;
        std::fill(w, w + b.patch, T(0));
        double offset = 0.0;
        for (int64_t i = 0; i < b.norms; ++i) {
          const bool skip = i == b.kernels;
          const double v = skip ? double(cov[(g * b.patch + skipped) * b.patch + skipped])
                                : rows[i * b.all() + at].var;
          const double var = v < 0.0 ? 0.0 : v;
          const T a = T(b.gamma(i, at) / std::sqrt(var + b.eps[i]));
          double mu = skip ? m[skipped] : 0.0;
          if (skip) w[skipped] += a;
          for (int64_t k = 0; !skip && k < b.patch; ++k) {
            const T value = kernels.row(g, i, o)[k];
            w[k] += a * value, mu += value * m[k];
          }
          means[i * b.all() + at] = mu, vars[i * b.all() + at] = var;
          scale[i * b.all() + at] = a, offset += b.beta(i, at);
          if (!skip) {
            sizes[i * b.all() + at] = rows[i * b.all() + at].size;
            explained[i * b.all() + at] = rows[i * b.all() + at].explained;
          }
        }
        for (int64_t k = 0; k < b.patch; ++k) offset -= double(w[k]) * origin[k];
        bias[at] = T(offset);
      }
  }
}

template <typename T>
void branch_gradients(int threads, const Block& b, double number, const double* weight_grad,
                      const double* bias_grad, const double* total, const double* rest,
                      const double* moved, const T* cov, const double* vars, const T* weight,
                      const T* scale, float* const* grads, T* slope, double* offset) {
  Kernels<T> kernels(b);
  std::vector<T> product(b.all() * b.patch), dvar(b.norms * b.all());
  for (T& v : dvar) v = T(0);
#pragma omp parallel num_threads(threads)
  {
    kernels.read(cov);
#pragma omp for collapse(2) schedule(static)
    for (int64_t g = 0; g < b.groups; ++g)
      for (int64_t o = 0; o < b.outputs; ++o) {
        const int64_t at = g * b.outputs + o, skipped = b.center(o);
        T* p = product.data() + at * b.patch;  // P, about the mean
        for (int64_t k = 0; k < b.patch; ++k)
          p[k] = T(weight_grad[at * b.patch + k] - bias_grad[at] * rest[g * b.patch + k]);
        for (int64_t i = 0; i < b.norms; ++i) {
          const double inverse = 1.0 / std::sqrt(vars[i * b.all() + at] + b.eps[i]);
          const double da = i == b.kernels ? double(p[skipped]) : dot(p, kernels.row(g, i, o), b.patch);
          grads[b.kernels + i][at] = float(da * inverse);
          grads[b.kernels + b.norms + i][at] = float(total[at]);
          dvar[i * b.all() + at] = T(-da * scale[i * b.all() + at] * inverse * inverse);  // twice
        }
      }
    kernels.multiply_covariance([&](int64_t g, int64_t i, int64_t o, int64_t first, int64_t count,
                                    const T* rows) {
      const int64_t at = g * b.outputs + o;
      const T a = scale[i * b.all() + at], dv = dvar[i * b.all() + at];
      const T* p = product.data() + at * b.patch + first;
      for (int64_t k = 0; k < count; ++k)
        b.write(i, at, first + k, float(a * p[k] + dv * rows[k]), grads);
    });
    kernels.weighted_gram(dvar.data(), slope);
#pragma omp for collapse(2) schedule(static)
    for (int64_t g = 0; g < b.groups; ++g)
      for (int64_t j = 0; j < b.patch; ++j) {
        T* row = slope + (g * b.patch + j) * b.patch;
        for (int64_t o = 0; b.norms > b.kernels && o < b.outputs; ++o)
          if (b.center(o) == j) row[j] += dvar[b.kernels * b.all() + g * b.outputs + o];
        double sum = 0.0;
        for (int64_t k = 0; k < b.patch; ++k)
          row[k] /= T(number), sum += double(row[k]) * moved[g * b.patch + k];
        for (int64_t o = 0; o < b.outputs; ++o) {
          const int64_t at = g * b.outputs + o;
          sum += double(weight[at * b.patch + j]) * bias_grad[at] / number;
        }
        offset[g * b.patch + j] = -sum;
      }
  }
}

}  // namespace

extern "C" {

// A block is told by its groups, their outputs O and the patch J, the taps of a channel, the
// convolutions and BatchNorms, and the entries of an output's last kernel. `moved` is m less the
// origin of the patches.

// μᵢ and vᵢ (norms, G, O); what the weights could make of the variance, and the variance that each
// branch explains, (kernels, G, O); Ŵ (G, O, J), b̂ (G, O) and aᵢ (norms, G, O), in C's dtype.
#define COLLAPSE(NAME, T)                                                                         \
  void NAME(int threads, int64_t groups, int64_t outputs, int64_t patch, int64_t area,            \
            int64_t kernels, int64_t norms, int64_t taps, const double* eps,                      \
            const float* const* tensors, const double* mean, const double* moved, const T* cov,   \
            double* means, double* vars, double* sizes, double* explained, T* weight, T* bias,    \
            T* scale) {                                                                           \
    const Block block{groups, outputs, patch, area, kernels, norms, taps, eps, tensors};          \
    collapse(threads, block, mean, moved, cov, means, vars, sizes, explained, weight, bias, scale); \
  }
COLLAPSE(collapse_float32, float)
COLLAPSE(collapse_float64, double)

// The gradients of the parameters, S (G, J, J) and r (G, J), from Σ g (x − o)ᵀ (G, O, J) and Σ g (G, O)
// of a g about a center and x about some o, which is `rest` before the mean, and the total Σ g.
#define BRANCH_GRADIENTS(NAME, T)                                                                 \
  void NAME(int threads, int64_t groups, int64_t outputs, int64_t patch, int64_t area,            \
            int64_t kernels, int64_t norms, int64_t taps, const double* eps,                      \
            const float* const* tensors, int64_t number, const double* weight_grad,               \
            const double* bias_grad, const double* total, const double* rest, const double* moved, \
            const T* cov, const double* vars, const T* weight, const T* scale,                    \
            float* const* grads, T* slope, double* offset) {                                      \
    const Block block{groups, outputs, patch, area, kernels, norms, taps, eps, tensors};          \
    branch_gradients(threads, block, double(number), weight_grad, bias_grad, total, rest, moved,  \
                     cov, vars, weight, scale, grads, slope, offset);                             \
  }
BRANCH_GRADIENTS(branch_gradients_float32, float)
BRANCH_GRADIENTS(branch_gradients_float64, double)

}  // extern "C"
