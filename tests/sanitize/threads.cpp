// Eight threads over the same inputs, each into memory of its own: for ThreadSanitizer, without Python or OpenMP
// (make sanitize). Every thread must get the bits that one thread alone gets.
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
  return out;
}

}  // namespace

int main() {
  const std::vector<float> alone = all_ops();
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
