#include "bind.hpp"

namespace ppo_fast {

void bind_whiten(py::module_& m) {
  m.def(
      "whiten",
      [](int dtype, Address values, Address mask, Address whitened, Address scale,
         std::int64_t num_rows, std::int64_t num_steps, int num_threads) {
        check({num_rows, num_steps}, num_threads, {values, mask, whitened});
        check({}, num_threads, {scale});
        const WhitenArgs args{static_cast<Dtype>(dtype),
                              pointer<const void>(values),
                              pointer<const std::uint8_t>(mask),
                              pointer<void>(whitened),
                              pointer<double>(scale),
                              num_rows,
                              num_steps};
        py::gil_scoped_release release;
        kernels().whiten(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("mask"), py::arg("whitened"),
      py::arg("scale"), py::arg("num_rows"), py::arg("num_steps"), py::arg("num_threads"),
      "Masked whitening; see csrc/kernels/whiten.hpp.");
  m.def(
      "whiten_backward",
      [](int dtype, Address grad_whitened, Address whitened, Address mask, Address scale,
         Address grad_values, std::int64_t num_rows, std::int64_t num_steps, int num_threads) {
        check({num_rows, num_steps}, num_threads, {grad_whitened, whitened, mask, grad_values});
        check({}, num_threads, {scale});
        const WhitenBackwardArgs args{static_cast<Dtype>(dtype),
                                      pointer<const void>(grad_whitened),
                                      pointer<const void>(whitened),
                                      pointer<const std::uint8_t>(mask),
                                      pointer<const double>(scale),
                                      pointer<void>(grad_values),
                                      num_rows,
                                      num_steps};
        py::gil_scoped_release release;
        kernels().whiten_backward(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("grad_whitened"), py::arg("whitened"),
      py::arg("mask"), py::arg("scale"), py::arg("grad_values"), py::arg("num_rows"),
      py::arg("num_steps"), py::arg("num_threads"),
      "Gradient of whitened values; see csrc/kernels/whiten.hpp.");
}

}  // namespace ppo_fast
