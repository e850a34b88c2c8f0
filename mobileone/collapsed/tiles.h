// Tiles of matrix products, in float32 or float64, for gram.cpp and algebra.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t CACHE_LINE = 64;
#ifdef __AVX512F__
constexpr int ROWS = 8, VECTORS = 3;  // of a tile: what registers hold
#else
constexpr int ROWS = 4, VECTORS = 1;
#endif

template <typename T>
constexpr int64_t WIDTH = VECTORS * CACHE_LINE / sizeof(T);  // columns of a tile

// Zeros whose first begins a cache line: vectors that cross two take twice the time.
template <typename T>
class Aligned {
  typedef char Line __attribute__((vector_size(CACHE_LINE)));

 public:
  explicit Aligned(int64_t count) : lines_((count * sizeof(T) + CACHE_LINE - 1) / CACHE_LINE) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }

 private:
  std::vector<Line> lines_;
};

// to (ROWS, WIDTH) = Σ_k left (depth, ROWS) · right (depth, WIDTH), or that added to it.
template <typename T>
inline void multiply(int64_t depth, const T* left, const T* right, T* to, bool add = false) {
  typedef T Vector __attribute__((vector_size(CACHE_LINE)));
  constexpr int lanes = CACHE_LINE / sizeof(T);
  Vector sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k, left += ROWS, right += WIDTH<T>) {
    Vector row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) std::memcpy(&row[v], right + v * lanes, CACHE_LINE);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j) {
      const Vector factor = Vector{} + left[j];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[j][v] += factor * row[v];
    }
  }
  for (int j = 0; j < ROWS; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      T* at = to + j * WIDTH<T> + v * lanes;
      Vector before = {};
      if (add) std::memcpy(&before, at, CACHE_LINE);
      before += sums[j][v];
      std::memcpy(at, &before, CACHE_LINE);
    }
}

}  // namespace
