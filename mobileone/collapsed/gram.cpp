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
constexpr int64_t PANEL = 32;               // rows of A that stay in the second-level cache

typedef int Index __attribute__((vector_size(LANES * sizeof(int))));

// Sums of neighbouring lanes: those of a in the first half, those of b in the second.
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

// Rows of (batch, groups, rows, length), PACK columns of one group at a time, less a shift a row;
// zeros beyond the last row and column.
struct Rows {
  int64_t batch, groups, rows, length, padded;
  std::vector<float> data;

  Rows(int64_t n, int64_t g, int64_t r, int64_t l)
      : batch(n), groups(g), rows(r), length(l), padded((r + BLOCK - 1) / BLOCK * BLOCK),
        data(padded * STRIDE, 0.0f) {}

  const float* at(int64_t row) const { return data.data() + row * STRIDE; }

  // Copy one row's columns first … first + count − 1, counted through the batch; returns their sum.
  double copy(const float* from, int64_t group, int64_t row, float shift, int64_t first,
            int64_t count) {
    float* to = data.data() + row * STRIDE;
    std::fill(to + count, to + std::min(STRIDE, count + LANES), 0.0f);
    while (count > 0) {
      const int64_t n = first / length, column = first % length;
      const int64_t part = std::min(count, length - column);
      const float* source = from + ((n * groups + group) * rows + row) * length + column;
      for (int64_t i = 0; i < part; ++i) to[i] = source[i] - shift;
      to += part, first += part, count -= part;
    }
    return sum(at(row), to);
  }

 private:
  // In float32 a lane, that is PACK / LANES values; the last lanes hold zeros.
  static double sum(const float* from, const float* end) {
    V lanes{};
    for (; from < end; from += LANES) lanes += load(from);
    return total(__builtin_convertvector(lanes, Wide));
  }
};

// One group's sums. Threads share out the rows to copy, and then the blocks of the result: no sum
// depends on their number.
void add_pack(const Rows& a, const Rows& b, bool symmetric, int64_t columns, double* products) {
  const int64_t panels = (a.padded + PANEL - 1) / PANEL, blocks = b.padded / BLOCK;
#pragma omp for collapse(2) schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * BLOCK, end = std::min(a.padded, (panel + 1) * PANEL);
      for (int64_t j = panel * PANEL; j < end; j += BLOCK) {
        if (symmetric && j < k) continue;
        double totals[SUMS] = {};
        add_block(a.at(j), b.at(k), columns, totals);
        for (int u = 0; u < BLOCK && j + u < a.rows; ++u)
          for (int v = 0; v < BLOCK && k + v < b.rows; ++v)
            products[(j + u) * b.rows + k + v] += totals[u * BLOCK + v];
      }
    }
}

}  // namespace

extern "C" {

// Σ a (b − shift)ᵀ (G, A, B) and Σ (b − shift) (G, B) over the images and columns of a (N, G, A, L)
// and b (N, G, B, L), with shift (G, B); a null stands for b − shift.
void row_products(int threads, int64_t batch, int64_t groups, int64_t a_rows, int64_t b_rows,
                  int64_t length, const float* a, const float* b, const float* shift,
                  double* products, double* sums) {
  Rows right(batch, groups, b_rows, length), left(batch, groups, a ? a_rows : 0, length);
  const int64_t columns = batch * length;
  std::fill(products, products + groups * a_rows * b_rows, 0.0);
  std::fill(sums, sums + groups * b_rows, 0.0);
#pragma omp parallel num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    double* to = products + g * a_rows * b_rows;
    for (int64_t first = 0; first < columns; first += PACK) {
      const int64_t count = std::min(PACK, columns - first);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < b_rows + left.rows; ++row)
        if (row < b_rows)
          sums[g * b_rows + row] += right.copy(b, g, row, shift[g * b_rows + row], first, count);
        else
          left.copy(a, g, row - b_rows, 0.0f, first, count);
      add_pack(a ? left : right, right, !a, count, to);
    }
    if (!a)
#pragma omp for schedule(static)
      for (int64_t j = 0; j < b_rows; ++j)
        for (int64_t k = j + 1; k < b_rows; ++k) to[j * b_rows + k] = to[k * b_rows + j];
  }
}

}  // extern "C"
