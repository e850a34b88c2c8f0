// The products of the Gram form on a CPU: float32, NCHW. Patches are never written out: a task copies
// the rows that it needs of a few columns. Names follow docs/collapsed-training.md. Compiled and
// loaded by cpu_build.py; plain C symbols, no PyTorch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "patches.h"
#include "planes.h"
#include "tiles.h"

namespace {

// Rows of A and of B whose products are summed at a time, one vector of sums each: what registers
// hold.
#ifdef __AVX512F__
constexpr int BLOCK = 4;
#else
constexpr int BLOCK = 2;
#endif
constexpr int SUMS = BLOCK * BLOCK;
constexpr int64_t PACK = 512;               // columns that are copied together
constexpr int64_t STRIDE = PACK + LANES;    // of a copied row: a power of two would fill one cache set
constexpr int64_t PANEL = 64, NEAR = 32;    // rows of A that stay in the second and first cache
constexpr int64_t SHORT = 128;              // terms of a sum in float32: sums of sums round less
constexpr int64_t TASKS = 16;               // into which the work is divided, or more
constexpr int64_t STEP = WIDTH<float>;      // columns of a tile

// Sums of neighboring lanes: those of a in the first half, those of b in the second.
inline V pairs(const V& a, const V& b) {
#ifdef __clang__
#define TAKE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int Index __attribute__((vector_size(LANES * sizeof(int))));
#define TAKE(...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
  return TAKE(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         TAKE(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#undef TAKE
}

// Sums of lanes of COUNT vectors in one, those of each next to one another.
template <int COUNT>
inline V gather(const V* v) {
  if constexpr (COUNT == 1)
    return *v;
  else
    return pairs(gather<COUNT / 2>(v), gather<COUNT / 2>(v + COUNT / 2));
}

// Add the sums of the lanes of every vector to its total.
inline void add_lanes(const V (&sums)[SUMS], double (&totals)[SUMS]) {
  const V all = gather<SUMS>(sums);
  constexpr int parts = LANES / SUMS;  // that are left of a vector
  for (int k = 0; k < SUMS; ++k)
    for (int p = 0; p < parts; ++p) totals[k] += all[k * parts + p];
}

// A vector that the compiler is to keep in a register rather than to read again for every product.
inline V kept(const float* p) {
  V v = load(p);
#ifdef __AVX512F__
  asm("" : "+v"(v));
#endif
  return v;
}

// Products of BLOCK copied rows of A with as many of B; a lane adds CHUNK / LANES of them in float32.
inline void add_block(const float* a, const float* b, int64_t columns, double (&totals)[SUMS]) {
  V sums[SUMS] = {};
  for (int64_t i = 0; i < columns; i += LANES) {
    V right[BLOCK];
#pragma GCC unroll 4
    for (int k = 0; k < BLOCK; ++k) right[k] = kept(b + k * STRIDE + i);
#pragma GCC unroll 4
    for (int j = 0; j < BLOCK; ++j) {
      const V left = kept(a + j * STRIDE + i);
#pragma GCC unroll 4
      for (int k = 0; k < BLOCK; ++k) sums[j * BLOCK + k] += left * right[k];
    }
  }
  add_lanes(sums, totals);
}

inline int64_t blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

// What one task does: the products of PANEL rows of A with all rows of B, over some of the columns.
// It copies the rows that it needs itself, so that tasks wait for nothing. A null A is B.
class Panel {
 public:
  Panel(const Patches* a, const Patches& b)
      : a_(a), b_(b), right_(blocks(b.rows()) * STRIDE), left_(a ? PANEL * STRIDE : 0) {}

  void add(int64_t group, int64_t row, int64_t first, int64_t columns, double* products,
           double* sums) {
    const int64_t width = b_.rows(), end = std::min((a_ ? a_ : &b_)->rows(), row + PANEL);
    const int64_t seen = a_ ? width : end;  // rows of B; of symmetric products one half
    for (int64_t k = 0; k < seen; ++k) {
      float* to = right_.data() + k * STRIDE;
      b_.copy(group, k, first, columns, to);
      if (k >= row && !a_) sums[k] += sum(to, columns);
    }
    for (int64_t j = row; a_ && j < end; ++j) {
      float* to = left_.data() + (j - row) * STRIDE;
      a_->copy(group, j, first, columns, to);
      sums[j] += sum(to, columns);
    }
    const float* left = a_ ? left_.data() : right_.data() + row * STRIDE;
    for (int64_t at = 0; at < columns; at += CHUNK)
      for (int64_t near = row; near < end; near += NEAR)
        add_near(left + at - row * STRIDE, right_.data() + at, near, std::min(end, near + NEAR),
                 std::min(CHUNK, columns - at), products);
  }

 private:
  // Of rows of A that stay in the first cache, from a on, in columns that are summed in float32.
  void add_near(const float* a, const float* b, int64_t row, int64_t end, int64_t columns,
                double* products) const {
    const int64_t width = b_.rows();
    for (int64_t k = 0; k < (a_ ? width : end); k += BLOCK)
      for (int64_t j = a_ ? row : std::max(row, k); j < end; j += BLOCK) {
        double totals[SUMS] = {};
        add_block(a + j * STRIDE, b + k * STRIDE, columns, totals);
        for (int u = 0; u < BLOCK && j + u < end; ++u)
          for (int v = 0; v < BLOCK && k + v < width; ++v)
            products[(j + u) * width + k + v] += totals[u * BLOCK + v];
      }
  }

  // Of a copied row.
  static double sum(float* row, int64_t columns) {
    Wide lanes{};
    for (int64_t i = 0; i < columns; i += LANES)
      lanes += __builtin_convertvector(load(row + i), Wide);
    return total(lanes);
  }

  const Patches* a_;
  const Patches& b_;
  Aligned<float> right_, left_;
};

// Σ a bᵀ (G, A, B) over the columns, and Σ a (G, A); a null a is b. The columns are shared out in
// parts by the shape alone: no sum depends on the number of threads. Called by all threads.
class RowProducts {
 public:
  RowProducts(const Patches* a, const Patches& b)
      : a_(a), b_(b), rows_((a ? a : &b)->rows()), width_(b.rows()), groups_(b.groups),
        packs_((b.columns() + PACK - 1) / PACK), panels_((rows_ + PANEL - 1) / PANEL),
        parts_(std::min(packs_, std::max(int64_t(1), TASKS / (panels_ * groups_)))),
        products_(parts_ * groups_ * rows_ * width_), sums_(parts_ * groups_ * rows_) {}

  void run(double* products, double* sums) {
    const int64_t all = groups_ * rows_;
    Panel task(a_, b_);
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t part = 0; part < parts_; ++part)
        for (int64_t panel = panels_ - 1; panel >= 0; --panel)
          for (int64_t pack = part * packs_ / parts_; pack < (part + 1) * packs_ / parts_; ++pack)
            task.add(g, panel * PANEL, pack * PACK, std::min(PACK, b_.columns() - pack * PACK),
                     products_.data() + (part * all + g * rows_) * width_,
                     sums_.data() + part * all + g * rows_);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all; ++row) {
      sums[row] = 0.0;
      for (int64_t part = 0; part < parts_; ++part) sums[row] += sums_[part * all + row];
      for (int64_t k = 0; k < width_; ++k) {
        const int64_t j = row % rows_, g = row / rows_;
        const bool upper = !a_ && k > j;  // is the mirror of what was summed
        double sum = 0.0;
        for (int64_t part = 0; part < parts_; ++part)
          sum += products_[(part * all + g * rows_ + (upper ? k : j)) * width_ + (upper ? j : k)];
        products[row * width_ + k] = sum;
      }
    }
  }

 private:
  const Patches* a_;
  const Patches& b_;
  int64_t rows_, width_, groups_, packs_, panels_, parts_;
  std::vector<double> products_, sums_;
};

// A matrix (groups, rows, columns) in memory, or its transpose.
struct Matrix {
  const float* data;
  int64_t columns;
  bool transposed;
};

// A sum of products of small matrices with patches, and a constant a row: what one task does is
// STEP columns, all rows.
class Products {
 public:
  Products(int64_t groups, int64_t rows, const float* constant)
      : groups_(groups), rows_(rows), tiles_((rows + ROWS - 1) / ROWS), constant_(constant) {}

  void add(const Matrix& matrix, const Patches& patches) {
    matrices_.push_back(matrix), patches_.push_back(&patches);
    depth_ += matrix.columns;
  }

  // Write to (batch, groups, rows, length), rectified on demand.
  void write(int threads, int64_t length, bool relu, float* to) {
    const int64_t columns = patches_[0]->columns(), steps = (columns + STEP - 1) / STEP;
    arrange();
#pragma omp parallel num_threads(threads)
    {
      Aligned<float> packed(depth_ * STEP);
#pragma omp for collapse(2) schedule(static)
      for (int64_t g = 0; g < groups_; ++g)
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t first = step * STEP, count = std::min(STEP, columns - first);
          float* row = packed.data();
          for (const Patches* patches : patches_)
            for (int64_t k = 0; k < patches->rows(); ++k, row += STEP)
              patches->copy(g, k, first, count, row);
          for (int64_t tile = 0; tile < tiles_; ++tile) {
            float sums[ROWS * STEP];
            const float* left = arranged_.data() + (g * tiles_ + tile) * depth_ * ROWS;
            for (int64_t k = 0; k < depth_; k += SHORT)
              multiply(std::min(SHORT, depth_ - k), left + k * ROWS, packed.data() + k * STEP, sums, k > 0);
            for (int64_t j = tile * ROWS; j < std::min(rows_, (tile + 1) * ROWS); ++j)
              put(sums + (j % ROWS) * STEP, constant_[g * rows_ + j], g * rows_ + j, first, count,
                  length, relu, to);
          }
        }
    }
  }

 private:
  // The matrices side by side, tile by tile, as they are read.
  void arrange() {
    arranged_.assign(groups_ * tiles_ * depth_ * ROWS, 0.0f);
    for (int64_t g = 0; g < groups_; ++g) {
      int64_t at = 0;
      for (const Matrix& m : matrices_) {
        for (int64_t j = 0; j < rows_; ++j)
          for (int64_t k = 0; k < m.columns; ++k)
            arranged_[((g * tiles_ + j / ROWS) * depth_ + at + k) * ROWS + j % ROWS] =
                m.data[g * rows_ * m.columns + (m.transposed ? k * rows_ + j : j * m.columns + k)];
        at += m.columns;
      }
    }
  }

  void put(const float* sums, float constant, int64_t row, int64_t first, int64_t count,
           int64_t length, bool relu, float* to) const {
    const float floor = relu ? 0.0f : -INFINITY;
    while (count > 0) {
      const int64_t n = first / length, column = first % length;
      const int64_t part = std::min(count, length - column);
      float* out = to + (n * groups_ * rows_ + row) * length + column;
      for (int64_t i = 0; i < part; ++i) {
        const float value = sums[i] + constant;
        out[i] = value < floor ? floor : value;
      }
      sums += part, first += part, count -= part;
    }
  }

  int64_t groups_, rows_, tiles_, depth_ = 0;
  const float* constant_;
  std::vector<Matrix> matrices_;
  std::vector<const Patches*> patches_;
  std::vector<float> arranged_;
};

}  // namespace

extern "C" {

// The patches of x are told by the batch, the groups and their channels, height and width, kernel
// size, stride, padding and dilation; `outputs` are those of a group, O.

// A shift near the mean of the patches, (G, J), to ten bits; Σ X Xᵀ (G, J, J) and Σ X (G, J) of the
// patches X less the shift.
void gram_moments(int threads, int64_t batch, int64_t groups, int64_t channels, int64_t height,
                  int64_t width, int64_t size, int64_t stride, int64_t padding, int64_t dilation,
                  const float* x, float* shift, double* products, double* sums) {
  const Patches patches(batch, groups, channels, height, width, size, stride, padding, dilation, x,
                        shift);
  RowProducts moments(nullptr, patches);
#pragma omp parallel num_threads(threads)
  {
    patches.center(shift);
    moments.run(products, sums);
  }
}

// Ŵ (x − shift) + b̂, rectified on demand, with Ŵ (G, O, J) and b̂ (G, O); shift may be null.
void gram_forward(int threads, int64_t batch, int64_t groups, int64_t channels, int64_t height,
                  int64_t width, int64_t size, int64_t stride, int64_t padding, int64_t dilation,
                  int64_t outputs, const float* x, const float* shift, const float* weight,
                  const float* bias, int64_t relu, float* y) {
  const Patches patches(batch, groups, channels, height, width, size, stride, padding, dilation, x,
                        shift);
  Products products(groups, outputs, bias);
  products.add({weight, patches.rows(), false}, patches);
  products.write(threads, patches.length(), relu != 0, y);
}

// A center near the mean of g, (G, O), to ten bits; Σ (g − center)(x − shift)ᵀ (G, O, J) and
// Σ (g − center) (G, O). g counts behind the rectifier (y null: there is none).
void gram_weight_grad(int threads, int64_t batch, int64_t groups, int64_t channels, int64_t height,
                      int64_t width, int64_t size, int64_t stride, int64_t padding,
                      int64_t dilation, int64_t outputs, const float* g, const float* y,
                      const float* x, const float* shift, float* center, double* products,
                      double* sums) {
  const Patches right(batch, groups, channels, height, width, size, stride, padding, dilation, x,
                      shift);
  const Patches left(right, outputs, g, y, center);
  RowProducts gradient(&left, right);
#pragma omp parallel num_threads(threads)
  {
    left.center(center);
    gradient.run(products, sums);
  }
}

// What the patches receive, (N, G, J, L): Ŵᵀ(g − center) + S (x − shift) + r, with S (G, J, J) and
// r (G, J); shift may be null.
void gram_input_grad(int threads, int64_t batch, int64_t groups, int64_t channels, int64_t height,
                     int64_t width, int64_t size, int64_t stride, int64_t padding, int64_t dilation,
                     int64_t outputs, const float* g, const float* y, const float* center,
                     const float* x, const float* shift, const float* weight, const float* slope,
                     const float* offset, float* to) {
  const Patches right(batch, groups, channels, height, width, size, stride, padding, dilation, x,
                      shift);
  const Patches left(right, outputs, g, y, center);
  Products products(groups, right.rows(), offset);
  products.add({weight, outputs, true}, left);
  products.add({slope, right.rows(), false}, right);
  products.write(threads, right.length(), false, to);
}

}  // extern "C"
