// The Python module ppo_fast._C. Tensors arrive as addresses (Tensor.data_ptr()): the launchers in
// ppo_fast/ops/*/cpp.py have made them contiguous, checked their shapes and hold them alive.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "gae.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Real>
void gae(std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t mask, std::uintptr_t dones,
         std::uintptr_t bootstrap_value, std::uintptr_t lam, std::uintptr_t advantages,
         std::uintptr_t returns, std::int64_t num_rows, std::int64_t num_steps, double gamma,
         int num_threads) {
  if (num_rows < 0 || num_steps < 0) throw py::value_error("num_rows and num_steps must be >= 0");
  if (num_threads < 1) throw py::value_error("num_threads must be >= 1");
  if (num_rows == 0 || num_steps == 0) return;
  for (auto address : {rewards, values, bootstrap_value, lam, advantages, returns}) {
    if (address == 0) throw py::value_error("only mask and dones may be null (0)");
  }
  const ppo_fast::GaeArgs<Real> args{
      pointer<const Real>(rewards),         pointer<const Real>(values),
      pointer<const bool>(mask),            pointer<const bool>(dones),
      pointer<const Real>(bootstrap_value), pointer<const Real>(lam),
      static_cast<Real>(gamma),             pointer<Real>(advantages),
      pointer<Real>(returns),               num_rows,
      num_steps};
  py::gil_scoped_release release;
  ppo_fast::gae(args, num_threads);
}

template <typename Real>
void bind_gae(py::module_& m, const char* name) {
  m.def(name, &gae<Real>, py::kw_only(), py::arg("rewards"), py::arg("values"), py::arg("mask"),
        py::arg("dones"), py::arg("bootstrap_value"), py::arg("lam"), py::arg("advantages"),
        py::arg("returns"), py::arg("num_rows"), py::arg("num_steps"), py::arg("gamma"),
        py::arg("num_threads"), "Generalised advantage estimation; see csrc/gae.hpp.");
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled CPU kernels of ppo_fast.";
  bind_gae<float>(m, "gae_float32");
  bind_gae<double>(m, "gae_float64");
}
