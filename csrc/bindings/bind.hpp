// What the files of this folder share. Tensors arrive as addresses (Tensor.data_ptr(); 0 is None):
// the launchers in ppo_fast/ops/*/cpp.py have checked shapes, dtypes and layouts and keep the
// tensors alive. The GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "kernels.hpp"

namespace ppo_fast {

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Refuses sizes below 0, a thread count below 1, and null among addresses that may not be null.
inline void check(std::initializer_list<std::int64_t> sizes, int num_threads,
                  std::initializer_list<Address> addresses) {
  if (num_threads < 1) throw py::value_error("num_threads must be >= 1");
  bool empty = false;
  for (auto size : sizes) {
    if (size < 0) throw py::value_error("sizes must be >= 0");
    empty = empty || size == 0;
  }
  for (auto address : addresses) {
    if (address == 0 && !empty) throw py::value_error("an address that must not be 0 is 0");
  }
}

void bind_decode_layer(py::module_& m);
void bind_few_row_linear(py::module_& m);
void bind_gae(py::module_& m);
void bind_kl_estimate(py::module_& m);
void bind_linear_logprobs(py::module_& m);
void bind_logprobs(py::module_& m);
void bind_memory(py::module_& m);
void bind_ppo_loss(py::module_& m);
void bind_quantize_rows(py::module_& m);
void bind_sample_tokens(py::module_& m);
void bind_value_loss(py::module_& m);
void bind_whiten(py::module_& m);

}  // namespace ppo_fast
