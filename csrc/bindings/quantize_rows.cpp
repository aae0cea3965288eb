#include "bind.hpp"

namespace ppo_fast {

void bind_quantize_rows(py::module_& m) {
  m.def(
      "quantize_rows",
      [](int dtype, Address weight, Address numbers, Address scales, std::int64_t num_rows,
         std::int64_t num_inputs, std::int64_t row_stride, std::int64_t input_stride,
         int num_threads) {
        check({num_rows, num_inputs}, num_threads, {weight, numbers});
        check({num_rows}, num_threads, {scales});
        const QuantizeRowsArgs args{static_cast<Dtype>(dtype),
                                    pointer<const void>(weight),
                                    pointer<std::int8_t>(numbers),
                                    pointer<float>(scales),
                                    num_rows,
                                    num_inputs,
                                    row_stride,
                                    input_stride};
        py::gil_scoped_release release;
        kernels().quantize_rows(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("weight"), py::arg("numbers"), py::arg("scales"),
      py::arg("num_rows"), py::arg("num_inputs"), py::arg("row_stride"), py::arg("input_stride"),
      py::arg("num_threads"), "Weights in int8; see csrc/kernels/quantize_rows.hpp.");
}

}  // namespace ppo_fast
