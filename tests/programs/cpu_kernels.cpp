// Calls every kind of CPU kernel on numbers of its own and prints what they return: a test compares
// what other compilers and processors make of it. Linked with the kernels, without PyTorch.

#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" {
void gram_moments(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t, const float*, float*, double*, double*);
void gram_forward(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int64_t, const float*, const float*, const float*, const float*, int64_t,
                  float*);
void gram_weight_grad(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, int64_t, const float*, const float*, const float*, const float*,
                      float*, double*, double*);
void collapse_float32(int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      const double*, const float* const*, const double*, const double*, const float*,
                      double*, double*, double*, double*, float*, float*, float*);
void depthwise_forward(int, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, int64_t,
                       int64_t, int64_t, const double*, const float* const*, int64_t, float*,
                       double*, double*, double*, double*, bool*);
void depthwise_backward(int, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                        const float*, const float*, int64_t, int64_t, int64_t, const double*,
                        const float* const*, const double*, const double*, const double*,
                        const bool*, float*, float* const*);
void channel_moments(int, int64_t, int64_t, int64_t, const float*, double*, double*);
}

namespace {

uint32_t state = 1;

std::vector<float> numbers(int64_t count, float shift = 0.0f) {
  std::vector<float> all(count);
  for (float& value : all) {
    state = state * 1664525u + 1013904223u;
    value = float(state >> 8) / 16777216.0f - 0.5f + shift;
  }
  return all;
}

template <typename T>
void print(const std::vector<T>& values) {
  for (T value : values) std::printf("%.9g\n", double(value));
}

void gram(int64_t channels, int64_t outputs, int64_t size, int64_t stride) {
  const int64_t height = 13, width = 11, batch = 3, patch = channels * size * size;
  const int64_t out = ((height - 1) / stride + 1) * ((width - 1) / stride + 1);
  const auto x = numbers(batch * channels * height * width, 2.0f), weight = numbers(outputs * patch);
  const auto g = numbers(batch * outputs * out), bias = numbers(outputs);
  std::vector<float> shift(patch), center(outputs), y(g.size()), cov(patch * patch);
  std::vector<double> products(patch * patch), sums(patch), grads(outputs * patch), rest(outputs);
  gram_moments(2, batch, 1, channels, height, width, size, stride, size / 2, 1, x.data(),
               shift.data(), products.data(), sums.data());
  gram_forward(2, batch, 1, channels, height, width, size, stride, size / 2, 1, outputs, x.data(),
               shift.data(), weight.data(), bias.data(), 1, y.data());
  gram_weight_grad(2, batch, 1, channels, height, width, size, stride, size / 2, 1, outputs,
                   g.data(), y.data(), x.data(), shift.data(), center.data(), grads.data(),
                   rest.data());
  print(shift), print(products), print(sums), print(y), print(grads);
  const int64_t n = batch * out;
  for (int64_t k = 0; k < patch * patch; ++k)
    cov[k] = float(products[k] / n - sums[k / patch] / n * (sums[k % patch] / n));
  const double eps[] = {1e-5};
  const auto gamma = numbers(outputs, 1.0f), beta = numbers(outputs);
  const float* tensors[] = {weight.data(), gamma.data(), beta.data()};
  std::vector<double> means(outputs), vars(outputs), some(outputs), part(outputs);
  std::vector<float> folded(outputs * patch), offset(outputs), scale(outputs);
  collapse_float32(2, 1, outputs, patch, size * size, 1, 1, patch, eps, tensors, sums.data(),
                   sums.data(), cov.data(), means.data(), vars.data(), some.data(), part.data(),
                   folded.data(), offset.data(), scale.data());
  print(means), print(vars), print(folded), print(offset);
}

void depthwise(int64_t stride) {
  const int64_t batch = 2, channels = 5, height = 21, width = 18;
  const int64_t out = ((height - 1) / stride + 1) * ((width - 1) / stride + 1);
  const auto x = numbers(batch * channels * height * width, 0.2f);
  const auto g = numbers(batch * channels * out), kernel = numbers(9 * channels, 0.1f);
  const auto one = numbers(channels, 1.0f), gamma = numbers(channels, 1.0f), beta = numbers(channels);
  const double eps[] = {1e-5, 1e-5};
  const float* tensors[] = {kernel.data(), one.data(), gamma.data(),
                            gamma.data(),  beta.data(), beta.data()};
  std::vector<float> y(g.size()), dx(x.size()), grads[6];
  float* places[6];
  for (int i = 0; i < 6; ++i) grads[i].resize(i ? channels : 9 * channels), places[i] = grads[i].data();
  std::vector<double> means(2 * channels), vars(2 * channels), m(9 * channels), cov(81 * channels);
  bool careful[5];
  depthwise_forward(2, batch, channels, height, width, stride, x.data(), 2, 2, 1, eps, tensors, 1,
                    y.data(), means.data(), vars.data(), m.data(), cov.data(), careful);
  depthwise_backward(2, batch, channels, height, width, stride, g.data(), y.data(), x.data(), 2, 2,
                     1, eps, tensors, vars.data(), m.data(), cov.data(), careful, dx.data(), places);
  print(y), print(means), print(vars), print(cov), print(dx);
  for (const auto& grad : grads) print(grad);
}

}  // namespace

int main() {
  gram(3, 5, 3, 2);
  gram(70, 9, 1, 1);
  depthwise(1);
  depthwise(2);
  const auto x = numbers(2 * 3 * 50, 1.0f);
  std::vector<double> mean(3), var(3);
  channel_moments(2, 2, 3, 50, x.data(), mean.data(), var.data());
  print(mean), print(var);
}
