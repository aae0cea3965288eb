#include "bind.hpp"

namespace ppo_fast {

void bind_gae(py::module_& m) {
  m.def(
      "gae",
      [](int dtype, Address rewards, Address values, Address mask, Address dones,
         Address bootstrap_value, Address lam, double gamma, Address advantages, Address returns,
         std::int64_t num_rows, std::int64_t num_steps, int num_threads) {
        check({num_rows, num_steps}, num_threads,
              {rewards, values, bootstrap_value, lam, advantages, returns});
        const GaeArgs args{static_cast<Dtype>(dtype),
                           pointer<const void>(rewards),
                           pointer<const void>(values),
                           pointer<const bool>(mask),
                           pointer<const bool>(dones),
                           pointer<const void>(bootstrap_value),
                           pointer<const void>(lam),
                           gamma,
                           pointer<void>(advantages),
                           pointer<void>(returns),
                           num_rows,
                           num_steps};
        py::gil_scoped_release release;
        kernels().gae(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("rewards"), py::arg("values"), py::arg("mask"),
      py::arg("dones"), py::arg("bootstrap_value"), py::arg("lam"), py::arg("gamma"),
      py::arg("advantages"), py::arg("returns"), py::arg("num_rows"), py::arg("num_steps"),
      py::arg("num_threads"), "Generalised advantage estimation; see csrc/kernels/gae.hpp.");
}

}  // namespace ppo_fast
