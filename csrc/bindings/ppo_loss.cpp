#include "bind.hpp"

namespace ppo_fast {

void bind_ppo_loss(py::module_& m) {
  m.def(
      "ppo_loss",
      [](int dtype, Address logprobs, Address old_logprobs, Address advantages, Address mask,
         Address entropy, Address ref_logprobs, Address weights, int ratio, int objective,
         double clip_low, double clip_high, double dual_clip, double kl_coef, int kl_estimator,
         double entropy_coef, int aggregation, double normalizer, Address loss, Address stats,
         Address grad_logprobs, Address grad_entropy, std::int64_t num_rows, std::int64_t num_steps,
         int num_threads) {
        check({num_rows, num_steps}, num_threads, {logprobs, old_logprobs, advantages, mask});
        check({}, num_threads, {loss, stats});
        if (kl_coef != 0.0) check({num_rows, num_steps}, num_threads, {ref_logprobs});
        if (entropy_coef != 0.0) check({num_rows, num_steps}, num_threads, {entropy});
        const PpoLossArgs args{static_cast<Dtype>(dtype),
                               pointer<const void>(logprobs),
                               pointer<const void>(old_logprobs),
                               pointer<const void>(advantages),
                               pointer<const std::uint8_t>(mask),
                               pointer<const void>(entropy),
                               pointer<const void>(ref_logprobs),
                               pointer<const void>(weights),
                               static_cast<Ratio>(ratio),
                               static_cast<Objective>(objective),
                               clip_low,
                               clip_high,
                               dual_clip,
                               kl_coef,
                               static_cast<KlEstimator>(kl_estimator),
                               entropy_coef,
                               static_cast<Aggregation>(aggregation),
                               normalizer,
                               pointer<void>(loss),
                               pointer<float>(stats),
                               pointer<void>(grad_logprobs),
                               pointer<void>(grad_entropy),
                               num_rows,
                               num_steps};
        py::gil_scoped_release release;
        kernels().ppo_loss(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("logprobs"), py::arg("old_logprobs"),
      py::arg("advantages"), py::arg("mask"), py::arg("entropy"), py::arg("ref_logprobs"),
      py::arg("weights"), py::arg("ratio"), py::arg("objective"), py::arg("clip_low"),
      py::arg("clip_high"), py::arg("dual_clip"), py::arg("kl_coef"), py::arg("kl_estimator"),
      py::arg("entropy_coef"), py::arg("aggregation"), py::arg("normalizer"), py::arg("loss"),
      py::arg("stats"), py::arg("grad_logprobs"), py::arg("grad_entropy"), py::arg("num_rows"),
      py::arg("num_steps"), py::arg("num_threads"),
      "The policy objective, its gradients and its metrics; see csrc/kernels/ppo_loss.hpp.");
}

}  // namespace ppo_fast
