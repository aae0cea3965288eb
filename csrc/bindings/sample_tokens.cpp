#include "bind.hpp"

namespace ppo_fast {

void bind_sample_tokens(py::module_& m) {
  m.def(
      "sample_tokens",
      [](int dtype, Address logits, std::int64_t row_stride, std::int64_t num_rows,
         std::int64_t vocab_size, Address seeds, Address positions, double temperature,
         std::int64_t top_k, double top_p, Address tokens, Address logprobs,
         Address sampling_logprobs, int num_threads) {
        check({num_rows, vocab_size}, num_threads,
              {logits, seeds, positions, tokens, logprobs, sampling_logprobs});
        if (!(temperature > 0) || top_k < 0 || !(0 < top_p && top_p <= 1)) {
          throw py::value_error("temperature, top_k or top_p is out of range");
        }
        const SampleTokensArgs args{static_cast<Dtype>(dtype),
                                    pointer<const void>(logits),
                                    row_stride,
                                    num_rows,
                                    vocab_size,
                                    pointer<const std::int64_t>(seeds),
                                    pointer<const std::int64_t>(positions),
                                    temperature,
                                    top_k,
                                    top_p,
                                    pointer<std::int64_t>(tokens),
                                    pointer<void>(logprobs),
                                    pointer<void>(sampling_logprobs)};
        py::gil_scoped_release release;
        kernels().sample_tokens(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("row_stride"),
      py::arg("num_rows"), py::arg("vocab_size"), py::arg("seeds"), py::arg("positions"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("tokens"),
      py::arg("logprobs"), py::arg("sampling_logprobs"), py::arg("num_threads"),
      "Gumbel-max draws; see csrc/kernels/sample_tokens.hpp.");
}

}  // namespace ppo_fast
