// Products A Bᵀ of long rows, for the Gram form: float32 in, float64 out, summed in short runs.
// Compiled and loaded by native.py with depthwise.cpp; plain C symbols, no PyTorch headers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "planes.h"

namespace {

// Rows of A and of B whose products are summed at a time, one vector of sums each: what registers
// hold.
#ifdef __AVX512F__
constexpr int BLOCK = 4;
#else
constexpr int BLOCK = 2;
#endif
constexpr int SUMS = BLOCK * BLOCK;
constexpr int64_t PACK = 1024;              // columns that are copied together
constexpr int64_t STRIDE = PACK + LANES;    // of a copied row: a power of two would fill one cache set
constexpr int64_t PANEL = 64;               // rows of A that stay in the second-level cache
constexpr int64_t TASKS = 16;               // into which the work is divided, or more

typedef int Index __attribute__((vector_size(LANES * sizeof(int))));

// Sums of neighboring lanes: those of a in the first half, those of b in the second.
inline V pairs(const V& a, const V& b) {
  const Index even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
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
  for (int64_t first = 0; first < columns; first += CHUNK) {
    const int64_t last = std::min(columns, first + CHUNK);
    V sums[SUMS] = {};
    for (int64_t i = first; i < last; i += LANES) {
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
}

// Rows of (batch, groups, rows, length), whose columns are counted through the batch.
struct Source {
  int64_t groups, rows, length;
  const float* data;

  // Copy columns first … first + count − 1 of a row less a shift, and zeros behind; returns their sum.
  double copy(int64_t group, int64_t row, float shift, int64_t first, int64_t count,
              float* to) const {
    float* const start = to;
    std::fill(to + count, to + std::min(STRIDE, count + LANES), 0.0f);
    while (count > 0) {
      const int64_t n = first / length, column = first % length;
      const int64_t part = std::min(count, length - column);
      const float* from = data + ((n * groups + group) * rows + row) * length + column;
      for (int64_t i = 0; i < part; ++i) to[i] = from[i] - shift;
      to += part, first += part, count -= part;
    }
    Wide lanes{};
    for (const float* p = start; p < to; p += LANES) lanes += __builtin_convertvector(load(p), Wide);
    return total(lanes);
  }
};

inline int64_t blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

// What one task does: the products of PANEL rows of A with all rows of B, over some of the columns.
// It copies the rows that it needs itself, so that tasks wait for nothing. A null A is B − shift.
class Panel {
 public:
  Panel(const Source* a, const Source& b)
      : a_(a), b_(b), right_(blocks(b.rows) * STRIDE), left_(a ? PANEL * STRIDE : 0) {}

  void add(int64_t group, int64_t row, const float* shift, int64_t first, int64_t columns,
           double* products, double* sums) {
    const int64_t all = (a_ ? a_ : &b_)->rows, end = std::min(all, row + PANEL);
    const int64_t seen = a_ ? b_.rows : end;  // rows of B; of symmetric products one half
    for (int64_t k = 0; k < seen; ++k) {
      const double sum = b_.copy(group, k, shift[k], first, columns, right_.data() + k * STRIDE);
      if (k >= row && !a_) sums[k] += sum;
    }
    for (int64_t j = row; a_ && j < end; ++j)
      a_->copy(group, j, 0.0f, first, columns, left_.data() + (j - row) * STRIDE);
    const float* left = a_ ? left_.data() : right_.data() + row * STRIDE;
    for (int64_t k = 0; k < seen; k += BLOCK)
      for (int64_t j = a_ ? row : std::max(row, k); j < end; j += BLOCK) {
        double totals[SUMS] = {};
        add_block(left + (j - row) * STRIDE, right_.data() + k * STRIDE, columns, totals);
        for (int u = 0; u < BLOCK && j + u < end; ++u)
          for (int v = 0; v < BLOCK && k + v < b_.rows; ++v)
            products[(j + u) * b_.rows + k + v] += totals[u * BLOCK + v];
      }
  }

 private:
  const Source* a_;
  const Source& b_;
  std::vector<float> right_, left_;
};

}  // namespace

extern "C" {

// Σ a (b − shift)ᵀ (G, A, B) over the images and columns of a (N, G, A, L) and b (N, G, B, L), with
// shift (G, B). A null a stands for b − shift, whose sums (G, B) are then told as well.
// The columns are shared out in parts by the shape alone: no sum depends on the number of threads.
void row_products(int threads, int64_t batch, int64_t groups, int64_t a_rows, int64_t b_rows,
                  int64_t length, const float* a, const float* b, const float* shift,
                  double* products, double* sums) {
  const Source left{groups, a_rows, length, a}, right{groups, b_rows, length, b};
  const int64_t columns = batch * length, packs = (columns + PACK - 1) / PACK;
  const int64_t panels = (a_rows + PANEL - 1) / PANEL;
  const int64_t parts = std::min(packs, std::max(int64_t(1), TASKS / (panels * groups)));
  const int64_t size = groups * a_rows * b_rows, sides = groups * b_rows;
  std::vector<double> products_of(parts * size, 0.0), sums_of(parts * sides, 0.0);
#pragma omp parallel num_threads(threads)
  {
    Panel task(a ? &left : nullptr, right);
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t panel = panels - 1; panel >= 0; --panel)
          for (int64_t pack = part * packs / parts; pack < (part + 1) * packs / parts; ++pack)
            task.add(g, panel * PANEL, shift + g * b_rows, pack * PACK,
                     std::min(PACK, columns - pack * PACK),
                     products_of.data() + part * size + g * a_rows * b_rows,
                     sums_of.data() + part * sides + g * b_rows);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < groups * a_rows; ++row)
      for (int64_t k = 0; k < b_rows; ++k) {
        const int64_t j = row % a_rows, g = row / a_rows;
        const bool upper = !a && k > j;  // is the mirror of what was summed
        double sum = 0.0;
        for (int64_t part = 0; part < parts; ++part)
          sum += products_of[part * size + (g * a_rows + (upper ? k : j)) * b_rows + (upper ? j : k)];
        products[row * b_rows + k] = sum;
      }
  }
  for (int64_t k = 0; !a && k < sides; ++k) {
    sums[k] = 0.0;
    for (int64_t part = 0; part < parts; ++part) sums[k] += sums_of[part * sides + k];
  }
}

}  // extern "C"
