#include "bind.hpp"

namespace ppo_fast {

void bind_logprobs(py::module_& m) {
  m.def(
      "logprobs_forward",
      [](int dtype, Address logits, std::int64_t outer_stride, std::int64_t inner,
         std::int64_t inner_stride, std::int64_t num_rows, std::int64_t vocab_size, Address labels,
         Address mask, double temperature, Address logprobs, Address entropy, Address stats,
         int num_threads) {
        check({num_rows, vocab_size}, num_threads, {logits, labels, logprobs, stats});
        const LogprobsArgs args{{static_cast<Dtype>(dtype), pointer<const void>(logits),
                                 outer_stride, inner, inner_stride, num_rows, vocab_size},
                                pointer<const std::int64_t>(labels),
                                pointer<const bool>(mask),
                                temperature,
                                entropy != 0,
                                pointer<void>(logprobs),
                                pointer<void>(entropy),
                                pointer<void>(stats)};
        py::gil_scoped_release release;
        kernels().logprobs_forward(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("outer_stride"), py::arg("inner"),
      py::arg("inner_stride"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("labels"),
      py::arg("mask"), py::arg("temperature"), py::arg("logprobs"), py::arg("entropy"),
      py::arg("stats"), py::arg("num_threads"),
      "Log-probs and entropies of rows of logits; see csrc/kernels/logprobs.hpp.");
  m.def(
      "logprobs_backward",
      [](int dtype, Address logits, std::int64_t outer_stride, std::int64_t inner,
         std::int64_t inner_stride, std::int64_t num_rows, std::int64_t vocab_size, Address labels,
         Address mask, double temperature, Address entropy, Address stats, Address grad_logprobs,
         Address grad_entropy, Address grad_logits, int num_threads) {
        check({num_rows, vocab_size}, num_threads, {logits, labels, stats, grad_logits});
        if (grad_entropy != 0 && entropy == 0) throw py::value_error("grad_entropy needs entropy");
        const LogprobsBackwardArgs args{{static_cast<Dtype>(dtype), pointer<const void>(logits),
                                         outer_stride, inner, inner_stride, num_rows, vocab_size},
                                        pointer<const std::int64_t>(labels),
                                        pointer<const bool>(mask),
                                        temperature,
                                        pointer<const void>(entropy),
                                        pointer<const void>(stats),
                                        pointer<const void>(grad_logprobs),
                                        pointer<const void>(grad_entropy),
                                        pointer<void>(grad_logits)};
        py::gil_scoped_release release;
        kernels().logprobs_backward(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("outer_stride"), py::arg("inner"),
      py::arg("inner_stride"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("labels"),
      py::arg("mask"), py::arg("temperature"), py::arg("entropy"), py::arg("stats"),
      py::arg("grad_logprobs"), py::arg("grad_entropy"), py::arg("grad_logits"),
      py::arg("num_threads"), "Gradient of the logits; see csrc/kernels/logprobs.hpp.");
}

}  // namespace ppo_fast
