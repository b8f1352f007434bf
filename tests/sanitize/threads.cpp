// Eight threads over the same inputs, each into memory of its own: for ThreadSanitizer, without Python or OpenMP
// (make sanitize). Every thread must get the bits that one thread alone gets.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "abi.h"

using namespace fastedit;

namespace {

constexpr int64_t kRows = 37, kWidth = 96, kRank = 3;
constexpr int kThreads = 8, kTurns = 40;

std::vector<float> numbers(size_t count, unsigned seed) {
  std::vector<float> all(count);
  for (float& one : all) one = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f;
  return all;
}

const auto x = numbers(kRows * kWidth, 1), residual = numbers(kRows * kWidth, 2), scale = numbers(kWidth, 3),
           bias = numbers(kWidth, 4), read = numbers(kRank * kWidth, 5), offset = numbers(kRank, 6),
           write = numbers(kRank * kWidth, 7), weight = numbers(kWidth, 8);

// What no norm is in: edit and its gradients, project and its, moments, value_ascent.
void other_ops(const Form& form, std::vector<float>& all) {
  std::vector<float> out(kRows * kWidth), z(kRows * kRank), d_hidden(out), d(2 * kWidth + kRank * (2 * kWidth + 1));
  float* at = d.data();
  EditArgs e{kRows, kWidth, form, F32, x.data(), kWidth, out.data(), z.data()};
  cpu::edit(e, nullptr);
  EditBackwardArgs b{};
  b.rows = kRows;
  b.width = kWidth;
  b.form = form;
  b.grad = residual.data();
  b.hidden = x.data();
  b.grad_stride = b.hidden_stride = kWidth;
  b.z = z.data();
  b.d_hidden = d_hidden.data();
  b.d_form = {at, at + kWidth, at + 2 * kWidth, at + (2 + kRank) * kWidth, at + (2 + kRank) * kWidth + kRank, nullptr};
  cpu::edit_backward(b, nullptr, nullptr);
  for (const auto* more : {&out, &z, &d_hidden, &d}) all.insert(all.end(), more->begin(), more->end());
  ProjectArgs p{kRows, kWidth, kRank, F32, x.data(), kWidth, read.data(), offset.data(), z.data()};
  cpu::project(p, nullptr);
  ProjectBackwardArgs q{kRows, kWidth, kRank, F32, z.data(), x.data(), kWidth, read.data(), d_hidden.data(), at, at + kRank * kWidth};
  cpu::project_backward(q, nullptr, nullptr);
  for (const auto* more : {&z, &d_hidden, &d}) all.insert(all.end(), more->begin(), more->end());
  std::vector<float> mean(2 * kWidth), m2(2 * kWidth);
  MomentsArgs m{kRows, kWidth, 1, F32, x.data(), kWidth, {}, mean.data(), m2.data()};
  cpu::moments(m, nullptr, nullptr);
  std::vector<float> gram(kRank * kRank);
  for (int64_t i = 0; i < kRank * kRank; ++i) {
    for (int64_t c = 0; c < kWidth; ++c) gram[i] += read[i / kRank * kWidth + c] * read[i % kRank * kWidth + c];
  }
  ValueAscentArgs v{};
  v.rows = kRows, v.width = kWidth, v.units = kRank, v.steps = 5, v.step_size = 0.1f, v.hidden = x.data(), v.hidden_stride = kWidth;
  v.weight = read.data(), v.bias = v.head = offset.data(), v.gram = gram.data(), v.out = out.data();
  cpu::value_ascent(v, nullptr);
  for (const auto* more : {&mean, &m2, &out}) all.insert(all.end(), more->begin(), more->end());
}

std::vector<float> all_ops() {
  std::vector<float> out(kRows * kWidth), normed(out), rstd(kRows), z(kRows * kRank), d_x(out), d(kWidth * 2 + kRank * (2 * kWidth + 1));
  EditAddNormArgs a{};
  a.add.rows = kRows;
  a.add.width = kWidth;
  a.add.form = {scale.data(), bias.data(), read.data(), offset.data(), write.data(), kRank, 1, nullptr, nullptr, 0, nullptr, nullptr};
  a.add.x = x.data();
  a.add.residual = residual.data();
  a.add.x_stride = a.add.residual_stride = kWidth;
  a.add.out = out.data();
  a.add.z = z.data();
  a.eps = 1e-6f;
  a.weight = weight.data();
  a.normed = normed.data();
  a.rstd = rstd.data();
  cpu::edit_add_norm(a, nullptr);
  EditAddNormBackwardArgs b{};
  b.rows = kRows;
  b.width = kWidth;
  b.form = a.add.form;
  b.grad_normed = residual.data();
  b.grad_normed_stride = b.x_stride = kWidth;
  b.residual_out = out.data();
  b.x = x.data();
  b.weight = weight.data();
  b.rstd = rstd.data();
  b.z = z.data();
  b.d_x = d_x.data();
  float* at = d.data();
  b.d_form = {at, at + kWidth, at + 2 * kWidth, at + (2 + kRank) * kWidth, at + (2 + kRank) * kWidth + kRank, nullptr};
  cpu::edit_add_norm_backward(b, nullptr, nullptr);
  for (const auto* more : {&normed, &rstd, &z, &d_x, &d}) out.insert(out.end(), more->begin(), more->end());
  other_ops(a.add.form, out);
  return out;
}

}  // namespace

int main() {
  const std::vector<float> alone = all_ops();
  for (float one : alone) {
    if (!std::isfinite(one)) return std::puts("a result is not finite"), 1;
  }
  int wrong[kThreads] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int turn = 0; turn < kTurns; ++turn) {
        const std::vector<float> mine = all_ops();
        wrong[t] += std::memcmp(mine.data(), alone.data(), mine.size() * sizeof(float)) != 0;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (int count : wrong) {
    if (count) return std::puts("a thread got other bits than one thread alone"), 1;
  }
  return std::puts("eight threads: the bits of one"), 0;
}
