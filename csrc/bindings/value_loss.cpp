#include "bind.hpp"

namespace ppo_fast {

void bind_value_loss(py::module_& m) {
  m.def(
      "value_loss",
      [](int dtype, Address values, Address old_values, Address returns, Address mask, double clip,
         double huber, double normalizer, Address loss, Address stats, Address grad_values,
         std::int64_t num_rows, std::int64_t num_steps, int num_threads) {
        check({num_rows, num_steps}, num_threads, {values, old_values, returns, mask});
        check({}, num_threads, {loss, stats});
        const ValueLossArgs args{static_cast<Dtype>(dtype),
                                 pointer<const void>(values),
                                 pointer<const void>(old_values),
                                 pointer<const void>(returns),
                                 pointer<const std::uint8_t>(mask),
                                 clip,
                                 huber,
                                 normalizer,
                                 pointer<void>(loss),
                                 pointer<float>(stats),
                                 pointer<void>(grad_values),
                                 num_rows,
                                 num_steps};
        py::gil_scoped_release release;
        kernels().value_loss(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("old_values"), py::arg("returns"),
      py::arg("mask"), py::arg("clip"), py::arg("huber"), py::arg("normalizer"), py::arg("loss"),
      py::arg("stats"), py::arg("grad_values"), py::arg("num_rows"), py::arg("num_steps"),
      py::arg("num_threads"),
      "The (clipped) squared or Huber error, its gradient and its metrics; see "
      "csrc/kernels/value_loss.hpp.");
}

}  // namespace ppo_fast
