// The Python module ppo_fast.ops._C.
#include <atomic>
#include <string>
#include <vector>

#include "bind.hpp"

namespace ppo_fast {

namespace {

// Returns the kernels that this processor can run, the best first. The compiler's builtin asks the
// processor, and whether the system saves the wide registers (XGETBV).
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets;
#if defined(PPO_FAST_HAVE_AVX512) || defined(PPO_FAST_HAVE_AVX512_BF16)
  const bool avx512 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef PPO_FAST_HAVE_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(&kernels_avx512_bf16);
#endif
#ifdef PPO_FAST_HAVE_AVX512
  if (avx512) sets.push_back(&kernels_avx512);
#endif
#ifdef PPO_FAST_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sets.push_back(&kernels_avx2);
#endif
  sets.push_back(&kernels_baseline);
  return sets;
}

std::atomic<const Kernels*> in_use{runnable().front()};

void use_instruction_set(const std::string& name) {
  for (const Kernels* set : runnable()) {
    if (name == set->instruction_set) {
      in_use = set;
      return;
    }
  }
  throw py::value_error("no kernels for instruction set '" + name +
                        "' here; see instruction_sets()");
}

}  // namespace

const Kernels& kernels() { return *in_use; }

}  // namespace ppo_fast

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace ppo_fast;
  m.doc() = "Compiled CPU kernels of ppo_fast.";
  m.def(
      "instruction_set", [] { return kernels().instruction_set; },
      "The instruction set of the kernels in use.");
  m.def(
      "instruction_sets",
      [] {
        py::list names;
        for (const Kernels* set : runnable()) names.append(set->instruction_set);
        return names;
      },
      "The instruction sets that this processor has kernels for, the best first.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Use other kernels from now on: for tests, and to compare results between machines.");
  bind_decode_layer(m);
  bind_few_row_linear(m);
  bind_gae(m);
  bind_kl_estimate(m);
  bind_linear_logprobs(m);
  bind_logprobs(m);
  bind_memory(m);
  bind_ppo_loss(m);
  bind_quantize_rows(m);
  bind_sample_tokens(m);
  bind_value_loss(m);
  bind_whiten(m);
}
