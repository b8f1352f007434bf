// Column sums over rows, the same for every thread count: fp32 partials over fixed blocks of rows, added as a
// pairwise tree over the blocks.
#pragma once
#include "cpu/rows.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int kOutOfMemory = -1;

// Rows in a block: a function of the row count alone. kBlockRows from 4,096 rows on (running sums over more
// lose digits), fewer before that so that a small batch still feeds several threads.
inline int64_t block_rows(int64_t rows) {
  const int64_t sixteenth = (rows + 15) / 16;
  if (sixteenth >= kBlockRows) return kBlockRows;
  return sixteenth < 32 ? 32 : (sixteenth + kGroup - 1) / kGroup * kGroup;
}

template <int L>
inline void accumulate(float* at, typename Lane<L>::F value) {
  Fp32::store<L>(at, Fp32::load<L>(at) + value);
}

inline void add_scaled(float* to, const float* from, float factor, int64_t width) {
  each_column(width, [=](auto lane, int64_t c) {
    typedef typename decltype(lane)::F F;
    const F sum = load_as<F>(to + c) + factor * load_as<F>(from + c);
    memcpy(to + c, &sum, sizeof sum);
  });
}

// `columns` sums over each of several runs of blocks: one run of all rows, or one run a slot.
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t columns) : rows_(rows), columns_(columns), size_(block_rows(rows)) {
    blocks_ = (rows + size_ - 1) / size_;
    allocate();
  }
  ColumnSums(const SlotOrder& order, int64_t slots, int64_t columns)
      : order_(order), slots_(slots), columns_(columns), size_(kBlockRows), blocks_(order.block_first[slots]) {
    allocate();
  }
  ~ColumnSums() { free(data_); }
  ColumnSums(const ColumnSums&) = delete;
  ColumnSums& operator=(const ColumnSums&) = delete;

  bool ok() const { return data_ || blocks_ * columns_ == 0; }
  int64_t blocks() const { return blocks_; }
  int64_t slot(int64_t block) const {
    if (!order_.order) return 0;
    int64_t low = 0, high = slots_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (order_.block_first[middle] <= block ? low : high) = middle;
    }
    return low;
  }
  // The block's rows are row(i) for i in [first, last).
  int64_t first(int64_t block) const {
    if (!order_.order) return block * size_;
    const int64_t s = slot(block);
    return order_.first[s] + (block - order_.block_first[s]) * size_;
  }
  int64_t last(int64_t block) const {
    const int64_t end = order_.order ? order_.first[slot(block) + 1] : rows_;
    const int64_t full = first(block) + size_;
    return full < end ? full : end;
  }
  int64_t row(int64_t i) const { return order_.order ? order_.order[i] : i; }
  float* partial(int64_t block) const { return data_ + block * columns_; }

  // The sums of one run: its first block's partial, after adding the others into it; null if it has no block.
  const float* reduce(int64_t run = 0) const {
    const int64_t begin = order_.order ? order_.block_first[run] : 0;
    const int64_t end = order_.order ? order_.block_first[run + 1] : blocks_;
    const int64_t chunk = 1024, tasks = (columns_ + chunk - 1) / chunk;
    each_task(tasks, (end - begin) * columns_, [&](int64_t task) {
      const int64_t at = task * chunk, count = at + chunk < columns_ ? chunk : columns_ - at;
      for (int64_t stride = 1; stride < end - begin; stride *= 2) {
        for (int64_t b = begin; b + stride < end; b += 2 * stride) {
          add_scaled(partial(b) + at, partial(b + stride) + at, 1.0f, count);
        }
      }
    });
    return begin < end ? partial(begin) : nullptr;
  }

 private:
  void allocate() {
    const size_t floats = static_cast<size_t>(blocks_) * static_cast<size_t>(columns_);
    data_ = floats ? static_cast<float*>(calloc(floats, sizeof(float))) : nullptr;
  }
  SlotOrder order_{};
  int64_t rows_ = 0, slots_ = 1, columns_, size_, blocks_;
  float* data_ = nullptr;
};

inline void copy_sum(float*& to, const float*& from, int64_t count) {
  if (!to) return;
  if (from) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    from += count;
  } else {
    memset(to, 0, static_cast<size_t>(count) * sizeof(float));
  }
  to += count;
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
