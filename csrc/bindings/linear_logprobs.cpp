#include "bind.hpp"

namespace ppo_fast {

void bind_linear_logprobs(py::module_& m) {
  m.def(
      "fold_tile",
      [](int dtype, std::int64_t num_rows, std::int64_t width, std::int64_t first_token,
         Address bias, double scale, double softcap, Address logits, Address labels,
         double temperature, bool with_entropy, Address state, int num_threads) {
        check({num_rows, width}, num_threads, {logits, labels, state});
        const FoldArgs args{{static_cast<Dtype>(dtype), num_rows, width, first_token,
                             pointer<const void>(bias), scale, softcap},
                            pointer<void>(logits),
                            pointer<const std::int64_t>(labels),
                            temperature,
                            with_entropy,
                            pointer<double>(state)};
        py::gil_scoped_release release;
        kernels().fold_tile(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("num_rows"), py::arg("width"),
      py::arg("first_token"), py::arg("bias"), py::arg("scale"), py::arg("softcap"),
      py::arg("logits"), py::arg("labels"), py::arg("temperature"), py::arg("with_entropy"),
      py::arg("state"), py::arg("num_threads"),
      "A tile of logits into the statistics of its rows; see csrc/kernels/linear_logprobs.hpp.");
  m.def(
      "finish_rows",
      [](int dtype, std::int64_t num_rows, Address state, double temperature, Address logprobs,
         Address entropy, Address stats) {
        check({num_rows}, 1, {state, logprobs, stats});
        const FinishArgs args{static_cast<Dtype>(dtype),    num_rows,
                              pointer<const double>(state), temperature,
                              pointer<void>(logprobs),      pointer<void>(entropy),
                              pointer<void>(stats)};
        py::gil_scoped_release release;
        kernels().finish_rows(args);
      },
      py::kw_only(), py::arg("dtype"), py::arg("num_rows"), py::arg("state"),
      py::arg("temperature"), py::arg("logprobs"), py::arg("entropy"), py::arg("stats"),
      "Log-probs and entropies from the statistics; see csrc/kernels/linear_logprobs.hpp.");
  m.def(
      "tile_gradient",
      [](int dtype, std::int64_t num_rows, std::int64_t width, std::int64_t first_token,
         Address bias, double scale, double softcap, Address logits, bool shaped, Address source,
         Address labels, double temperature, Address stats, Address entropy, Address grad_logprobs,
         Address grad_entropy, Address gradient, int num_threads) {
        check({num_rows, width}, num_threads, {logits, labels, stats, gradient});
        if (grad_entropy != 0 && entropy == 0) throw py::value_error("grad_entropy needs entropy");
        const TileGradientArgs args{{static_cast<Dtype>(dtype), num_rows, width, first_token,
                                     pointer<const void>(bias), scale, softcap},
                                    pointer<const void>(logits),
                                    shaped,
                                    pointer<const std::int64_t>(source),
                                    pointer<const std::int64_t>(labels),
                                    temperature,
                                    pointer<const void>(stats),
                                    pointer<const void>(entropy),
                                    pointer<const void>(grad_logprobs),
                                    pointer<const void>(grad_entropy),
                                    pointer<void>(gradient)};
        py::gil_scoped_release release;
        kernels().tile_gradient(args, num_threads);
      },
      py::kw_only(), py::arg("dtype"), py::arg("num_rows"), py::arg("width"),
      py::arg("first_token"), py::arg("bias"), py::arg("scale"), py::arg("softcap"),
      py::arg("logits"), py::arg("shaped"), py::arg("source"), py::arg("labels"),
      py::arg("temperature"), py::arg("stats"), py::arg("entropy"), py::arg("grad_logprobs"),
      py::arg("grad_entropy"), py::arg("gradient"), py::arg("num_threads"),
      "A tile of logits into the gradient of its product; see csrc/kernels/linear_logprobs.hpp.");
}

}  // namespace ppo_fast
