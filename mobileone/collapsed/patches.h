// Patches of images as columns of a matrix, for gram.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "planes.h"

namespace {

constexpr int64_t RUN = 32, RUNS = 32;  // columns that are read together for a mean, and how often

// The patches of images (N, G · C, H, W), less a shift (G, J) unless that is null: a row is a tap of
// a channel, columns are counted through the batch.
class Patches {
 public:
  const int64_t groups;

  Patches(int64_t batch, int64_t groups, int64_t channels, int64_t height, int64_t width,
          int64_t size, int64_t stride, int64_t padding, int64_t dilation, const float* data,
          const float* shift)
      : groups(groups), batch_(batch), channels_(channels), height_(height), width_(width),
        size_(size), stride_(stride), padding_(padding), dilation_(dilation),
        out_height_((height + 2 * padding - dilation * (size - 1) - 1) / stride + 1),
        out_width_((width + 2 * padding - dilation * (size - 1) - 1) / stride + 1), data_(data),
        shift_(shift) {}

  // The gradient g (N, G · O, H', W') of what is made of patches, where y > 0 if y is not null.
  Patches(const Patches& of, int64_t outputs, const float* g, const float* y, const float* shift)
      : Patches(of.batch_, of.groups, outputs, of.out_height_, of.out_width_, 1, 1, 0, 1, g, shift) {
    y_ = y;
  }

  int64_t rows() const { return channels_ * size_ * size_; }
  int64_t length() const { return out_height_ * out_width_; }  // columns of an image
  int64_t columns() const { return batch_ * length(); }

  // Copy columns first … first + count − 1 of a row, and zeros to the end of a vector.
  void copy(int64_t group, int64_t row, int64_t first, int64_t count, float* to) const {
    copy(group, row, shift_ ? shift_[group * rows() + row] : 0.0f, first, count, to);
  }

  // Find a shift near the mean of each row from a part of the columns. Nothing depends on it but
  // rounding, and it has ten bits, so that differences from it, and their products where a value is
  // frequent, are exact: low bits would be rounded away alike in all of them. Called by all threads.
  void center(float* shift) const {
    const int64_t all = columns(), runs = std::min(RUNS, (all + RUN - 1) / RUN);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < groups * rows(); ++row) {
      double sum = 0.0;
      int64_t seen = 0;
      for (int64_t run = 0; run < runs; ++run) {
        float values[RUN + LANES];
        const int64_t first = all <= RUN * RUNS ? run * RUN : run * (all - RUN) / (runs - 1);
        const int64_t count = std::min(RUN, all - first);
        copy(row / rows(), row % rows(), 0.0f, first, count, values);
        for (int64_t i = 0; i < count; ++i) sum += values[i];
        seen += count;
      }
      int exponent;
      const double fraction = std::frexp(sum / double(seen), &exponent);
      const float value = float(std::ldexp(std::nearbyint(fraction * 1024) / 1024, exponent));
      shift[row] = std::isfinite(value) ? value : 0.0f;
    }
  }

 private:
  void copy(int64_t group, int64_t row, float shift, int64_t first, int64_t count, float* to) const {
    std::fill(to + count, to + (count + LANES - 1) / LANES * LANES, 0.0f);
    const int64_t area = size_ * size_, channel = group * channels_ + row / area;
    while (count > 0) {
      const int64_t n = first / length(), column = first % length();
      const int64_t plane = (n * groups * channels_ + channel) * height_ * width_;
      int64_t part;
      if (area == 1 && stride_ == 1 && padding_ == 0) {
        part = std::min(count, length() - column);
        const float* from = data_ + plane + column;
        if (y_)
          for (int64_t i = 0; i < part; ++i) to[i] = masked(from[i], y_[plane + column + i]) - shift;
        else
          for (int64_t i = 0; i < part; ++i) to[i] = from[i] - shift;
      } else {
        part = std::min(count, out_width_ - column % out_width_);
        copy_taps(data_ + plane, row % area, column, part, shift, to);
      }
      to += part, first += part, count -= part;
    }
  }

  // A tap of patches of one row of outputs.
  void copy_taps(const float* plane, int64_t tap, int64_t column, int64_t count, float shift,
                 float* to) const {
    const int64_t r = column / out_width_ * stride_ - padding_ + tap / size_ * dilation_;
    const int64_t q = column % out_width_ * stride_ - padding_ + tap % size_ * dilation_;
    const bool inside = r >= 0 && r < height_;
    const int64_t before = inside ? std::min(count, std::max(int64_t(0), (stride_ - 1 - q) / stride_)) : count;
    const int64_t end = std::min(count, std::max(before, (width_ - q + stride_ - 1) / stride_));
    const float* from = plane + r * width_ + q;
    for (int64_t i = 0; i < before; ++i) to[i] = -shift;
    if (stride_ == 2)
      for (int64_t i = before; i < end; ++i) to[i] = from[2 * i] - shift;
    else
      for (int64_t i = before; i < end; ++i) to[i] = from[stride_ * i] - shift;
    for (int64_t i = std::max(before, end); i < count; ++i) to[i] = -shift;
  }

  int64_t batch_, channels_, height_, width_, size_, stride_, padding_, dilation_, out_height_,
      out_width_;
  const float *data_, *y_ = nullptr, *shift_;
};

}  // namespace
