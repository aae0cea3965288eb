#include "bind.hpp"

namespace ppo_fast {

void bind_few_row_linear(py::module_& m) {
  m.def(
      "few_row_linear",
      [](int dtype, int weight_dtype, Address x, Address weight, Address bias, Address scales,
         Address y, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t num_outputs,
         std::int64_t weight_stride, int num_threads) {
        check({num_rows, num_inputs, num_outputs}, num_threads, {x, weight});
        check({num_rows, num_outputs}, num_threads, {y});
        const FewRowLinearArgs args{static_cast<Dtype>(dtype),
                                    static_cast<Dtype>(weight_dtype),
                                    pointer<const void>(x),
                                    pointer<const void>(weight),
                                    pointer<const void>(bias),
                                    pointer<const float>(scales),
                                    pointer<void>(y),
                                    num_rows,
                                    num_inputs,
                                    num_outputs,
                                    weight_stride};
        py::gil_scoped_release release;
        kernels().few_row_linear(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("weight_dtype"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("scales"), py::arg("y"), py::arg("num_rows"), py::arg("num_inputs"),
      py::arg("num_outputs"), py::arg("weight_stride"), py::arg("num_threads"),
      "A linear layer for few rows; see csrc/kernels/few_row_linear.hpp.");
}

}  // namespace ppo_fast
