#include "bind.hpp"

namespace ppo_fast {

namespace {

// Reads a layer's weights and sizes, which are given once; each call gives the other arguments.
DecodeLayerArgs of_dict(const py::dict& given) {
  const auto address = [&](const char* name) {
    return pointer<const void>(given[name].cast<Address>());
  };
  const auto size = [&](const char* name) { return given[name].cast<std::int64_t>(); };
  const auto real = [&](const char* name) { return given[name].cast<double>(); };
  const auto flag = [&](const char* name) { return given[name].cast<bool>(); };
  const auto matrix = [&](const char* name) {
    const auto [data, stride, scales] =
        given[name].cast<std::tuple<Address, std::int64_t, Address>>();
    return Matrix{pointer<const void>(data), stride, pointer<const float>(scales)};
  };
  DecodeLayerArgs args{};
  args.dtype = static_cast<Dtype>(given["dtype"].cast<int>());
  args.weight_dtype = static_cast<Dtype>(given["weight_dtype"].cast<int>());
  args.hidden_size = size("hidden_size");
  args.num_heads = size("num_heads");
  args.num_kv_heads = size("num_kv_heads");
  args.head_size = size("head_size");
  args.intermediate_size = size("intermediate_size");
  args.window = size("window");
  args.inputs_first = flag("inputs_first");
  args.layer_norm = flag("layer_norm");
  args.activation = static_cast<Activation>(given["activation"].cast<int>());
  args.scaling = real("scaling");
  args.softcap = real("softcap");
  args.attention_norm = address("attention_norm");
  args.mlp_norm = address("mlp_norm");
  args.attention_norm_bias = address("attention_norm_bias");
  args.mlp_norm_bias = address("mlp_norm_bias");
  args.attention_out_norm = address("attention_out_norm");
  args.mlp_out_norm = address("mlp_out_norm");
  args.q_weight = matrix("q_weight");
  args.k_weight = matrix("k_weight");
  args.v_weight = matrix("v_weight");
  args.o_weight = matrix("o_weight");
  args.q_bias = address("q_bias");
  args.k_bias = address("k_bias");
  args.v_bias = address("v_bias");
  args.o_bias = address("o_bias");
  args.q_norm = address("q_norm");
  args.k_norm = address("k_norm");
  args.gate_weight = matrix("gate_weight");
  args.up_weight = matrix("up_weight");
  args.down_weight = matrix("down_weight");
  args.gate_bias = address("gate_bias");
  args.up_bias = address("up_bias");
  args.down_bias = address("down_bias");
  args.attention_eps = real("attention_eps");
  args.mlp_eps = real("mlp_eps");
  args.attention_out_eps = real("attention_out_eps");
  args.mlp_out_eps = real("mlp_out_eps");
  args.q_eps = real("q_eps");
  args.k_eps = real("k_eps");
  return args;
}

}  // namespace

void bind_decode_layer(py::module_& m) {
  py::class_<DecodeLayerArgs>(m, "DecodeLayer",
                              "A transformer layer, for decoding steps; see "
                              "csrc/kernels/decode_layer.hpp. Vectors are addresses, matrices "
                              "addresses, strides of rows and addresses of scales, 0 where there "
                              "is none; they must outlive it.")
      .def(py::init(&of_dict), py::arg("weights_and_sizes"))
      .def(
          "__call__",
          [](const DecodeLayerArgs& layer, Address x, Address cos, Address sin, int cache_dtype,
             Address keys, Address values, std::int64_t capacity, Address slots, Address lengths,
             Address y, Address scratch, std::int64_t num_rows, int num_threads) {
            check({num_rows, capacity}, num_threads, {x, keys, values, slots, lengths, y, scratch});
            DecodeLayerArgs args = layer;
            args.x = pointer<const void>(x);
            args.cos = pointer<const void>(cos);
            args.sin = pointer<const void>(sin);
            args.cache_dtype = static_cast<Dtype>(cache_dtype);
            args.keys = pointer<void>(keys);
            args.values = pointer<void>(values);
            args.capacity = capacity;
            args.slots = pointer<const std::int64_t>(slots);
            args.lengths = pointer<const std::int64_t>(lengths);
            args.y = pointer<void>(y);
            args.scratch = pointer<void>(scratch);
            args.num_rows = num_rows;
            py::gil_scoped_release release;
            kernels().decode_layer(args, num_threads);
          },
          py::kw_only(), py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("cache_dtype"),
          py::arg("keys"), py::arg("values"), py::arg("capacity"), py::arg("slots"),
          py::arg("lengths"), py::arg("y"), py::arg("scratch"), py::arg("num_rows"),
          py::arg("num_threads"));
}

}  // namespace ppo_fast
