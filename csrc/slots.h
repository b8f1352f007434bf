// A slot out of range would read another tenant's memory: looked for before anything is written. Only in host
// memory; on a GPU the kernels leave such a row alone.
#pragma once
#include <cstdio>

#include "abi.h"

namespace fastedit {

struct SlotFault {
  char text[128];  // empty: none

  SlotFault(const Form& form, int64_t rows) {
    text[0] = 0;
    if (!form.slot) return;
    for (int64_t row = 0; row < rows; ++row) {
      if (form.slot[row] >= -1 && form.slot[row] < form.slots) continue;
      std::snprintf(text, sizeof text, "slot of row %lld is %d, expected -1 (untouched) or 0 to %lld",
                    static_cast<long long>(row), form.slot[row], static_cast<long long>(form.slots - 1));
      return;
    }
  }
  explicit operator bool() const { return text[0] != 0; }
};

template <class Args>
SlotFault slot_fault(const Args& a) { return {a.form, a.rows}; }
inline SlotFault slot_fault(const EditAddNormArgs& a) { return {a.add.form, a.add.rows}; }
inline SlotFault slot_fault(const ProjectArgs&) { return {Form{}, 0}; }
inline SlotFault slot_fault(const ProjectBackwardArgs&) { return {Form{}, 0}; }
inline SlotFault slot_fault(const MomentsArgs&) { return {Form{}, 0}; }
inline SlotFault slot_fault(const ValueAscentArgs&) { return {Form{}, 0}; }

}  // namespace fastedit
