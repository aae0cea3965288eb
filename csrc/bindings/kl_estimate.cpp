#include "bind.hpp"

namespace ppo_fast {

void bind_kl_estimate(py::module_& m) {
  m.def(
      "kl_estimate",
      [](int dtype, Address logprobs, Address ref_logprobs, Address mask, int estimator,
         Address estimate, Address slope, std::int64_t num_tokens, int num_threads) {
        check({num_tokens}, num_threads, {logprobs, ref_logprobs, estimate});
        const KlEstimateArgs args{static_cast<Dtype>(dtype),
                                  pointer<const void>(logprobs),
                                  pointer<const void>(ref_logprobs),
                                  pointer<const std::uint8_t>(mask),
                                  static_cast<KlEstimator>(estimator),
                                  pointer<void>(estimate),
                                  pointer<void>(slope),
                                  num_tokens};
        py::gil_scoped_release release;
        kernels().kl_estimate(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("logprobs"), py::arg("ref_logprobs"),
      py::arg("mask"), py::arg("estimator"), py::arg("estimate"), py::arg("slope"),
      py::arg("num_tokens"), py::arg("num_threads"),
      "Per-token KL estimates and their slopes; see csrc/kernels/kl_estimate.hpp.");
}

}  // namespace ppo_fast
