// The one file that knows torch. It uses only torch's stable ABI, so one library serves CPU and CUDA builds of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops.h"
#include "rubric_table.h"

#if defined(MEGARUBRIC_CUDA) && !defined(MEGARUBRIC_HOST_DEVICE)
// Weak: a CPU-only torch does not have it, and never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace megarubric {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("megarubric: " + what);
}

Tensor expect(const Tensor& t, ScalarType dtype, int64_t dim, const char* name) {
  require(t.scalar_type() == dtype, std::string(name) + " has the wrong dtype");
  require(t.dim() == dim, std::string(name) + " must have " + std::to_string(dim) + " dimension(s)");
  return torch::stable::contiguous(t);
}

void same_device(const Tensor& a, const Tensor& b, const char* name) {
  require(a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index()),
          std::string(name) + " is on another device");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}

void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

#if !defined(MEGARUBRIC_HOST_DEVICE)

const cpu::Kernels kKernels[] = {
#if defined(__x86_64__)
    {"avx512", avx512::aggregate, avx512::tier_expectation, avx512::weight_digest},
    {"avx2", avx2::aggregate, avx2::tier_expectation, avx2::weight_digest},
#endif
    {"baseline", baseline::aggregate, baseline::tier_expectation, baseline::weight_digest},
};

bool supported(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (std::strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2");
#endif
  return std::strcmp(isa, "baseline") == 0;
}

const cpu::Kernels* find_kernels(const char* wanted) {
  for (const cpu::Kernels& k : kKernels) {
    if (supported(k.name) && (wanted == nullptr || std::strcmp(wanted, k.name) == 0)) return &k;
  }
  return nullptr;
}

std::atomic<const cpu::Kernels*> chosen_kernels{find_kernels(nullptr)};  // the widest set this CPU has

const cpu::Kernels& kernels() { return *chosen_kernels.load(); }

#endif

#if defined(MEGARUBRIC_CUDA) && !defined(MEGARUBRIC_HOST_DEVICE)
void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  require(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  return stream;
}
#endif

// Tensors an aggregation reads, checked and made contiguous; `table` is [words] or, in a sweep, [tables, words].
struct AggregateInputs {
  Tensor scores, offsets, rubric, table;
  std::optional<Tensor> mask;
  AggregateArgs args;

  AggregateInputs(const Tensor& scores_in, const std::optional<Tensor>& mask_in, const Tensor& offsets_in,
                  const Tensor& rubric_in, const Tensor& table_in, int64_t table_dim)
      : scores(expect(scores_in, ScalarType::Float, 1, "scores")),
        offsets(expect(offsets_in, ScalarType::Long, 1, "offsets")),
        rubric(expect(rubric_in, ScalarType::Int, 1, "rubric_index")),
        table(expect(table_in, ScalarType::Int, table_dim, "table")) {
    same_device(scores, offsets, "offsets");
    same_device(scores, rubric, "rubric_index");
    same_device(scores, table, "table");
    if (mask_in.has_value()) {
      mask = expect(*mask_in, ScalarType::Bool, 1, "mask");
      same_device(scores, *mask, "mask");
      require(mask->numel() == scores.numel(), "mask and scores differ in length");
      args.mask = data<uint8_t>(*mask);
    }
    if (reinterpret_cast<uintptr_t>(table.data_ptr()) % 16 != 0) table = torch::stable::clone(table);  // a view
    require(reinterpret_cast<uintptr_t>(table.data_ptr()) % 16 == 0, "table is not aligned to 16 bytes");
    args.n = rubric.numel();
    args.nnz = scores.numel();
    require(offsets.numel() == args.n + 1, "offsets must have one entry more than rubric_index");
    args.n_tables = static_cast<int32_t>(table_dim == 2 ? table.size(0) : 1);
    args.table_words = table.size(table_dim - 1);
    require(args.table_words >= 8 && args.table_words % 4 == 0 && args.n_tables >= 1, "table was not made by pack_rubrics");
    args.scores = data<float>(scores);
    args.offsets = data<int64_t>(offsets);
    args.rubric = data<int32_t>(rubric);
    args.table = data<int32_t>(table);
    if (scores.is_cpu()) {
      for (int32_t p = 0; p < args.n_tables; ++p) {
        const auto* header = reinterpret_cast<const TableHeader*>(args.table + p * args.table_words);
        require(header->magic == kTableMagic && header->words == args.table_words, "table was not made by pack_rubrics");
      }
    }
  }
};

using AggregateOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
AggregateOutputs run_aggregate(AggregateInputs& in, bool attribution, int64_t max_pairs, Launch launch) {
  AggregateArgs& a = in.args;
  const Tensor reward = empty(in.scores, {a.n}, ScalarType::Float), r0 = empty(in.scores, {a.n}, ScalarType::Float);
  const Tensor r1 = empty(in.scores, {a.n}, ScalarType::Float), veto = empty(in.scores, {a.n}, ScalarType::Int);
  const Tensor valid = empty(in.scores, {a.n}, ScalarType::Bool), vetoed = empty(in.scores, {a.n}, ScalarType::Bool);
  const Tensor shares = empty(in.scores, {attribution ? a.nnz : 0}, ScalarType::Float);
  const Tensor pair_shares = empty(in.scores, {attribution ? a.n : 0, max_pairs}, ScalarType::Float);
  const Tensor bad = empty(in.scores, {2}, ScalarType::Long);
  a.reward = data<float>(reward);
  a.r0 = data<float>(r0);
  a.r1 = data<float>(r1);
  a.veto = data<int32_t>(veto);
  a.valid = data<uint8_t>(valid);
  a.vetoed = data<uint8_t>(vetoed);
  a.bad = data<int64_t>(bad);
  if (attribution) {
    if (in.scores.is_cpu()) {
      const auto* header = reinterpret_cast<const TableHeader*>(a.table);
      require(max_pairs >= header->max_pairs, "max_pairs is below the table's");
    }
    a.attribution = data<float>(shares);
    a.pair_attribution = data<float>(pair_shares);
    a.max_pairs = static_cast<int32_t>(max_pairs);
  }
  launch(a);
  return {reward, valid, vetoed, veto, r0, r1, shares, pair_shares, bad};
}

template <class Launch>
std::tuple<Tensor, Tensor> run_sweep(AggregateInputs& in, Launch launch) {
  AggregateArgs& a = in.args;
  const Tensor reward = empty(in.scores, {a.n_tables, a.n}, ScalarType::Float);
  const Tensor bad = empty(in.scores, {2}, ScalarType::Long);
  a.reward = data<float>(reward);
  a.bad = data<int64_t>(bad);
  launch(a);
  return {reward, bad};
}

template <class Launch>
std::tuple<Tensor, Tensor> run_advantages(const Tensor& values_in, const Tensor& valid_in, const Tensor& offsets_in,
                                          const std::optional<Tensor>& order_in, const std::optional<Tensor>& weights_in,
                                          bool standardize, Launch launch) {
  const int64_t dim = weights_in.has_value() ? 2 : 1;
  const Tensor values = expect(values_in, ScalarType::Float, dim, "rewards or scores");
  const Tensor valid = expect(valid_in, ScalarType::Bool, dim, "valid or mask");
  const Tensor offsets = expect(offsets_in, ScalarType::Long, 1, "group_offsets");
  require(values.numel() == valid.numel(), "values and valid differ in shape");
  require(offsets.numel() >= 1, "group_offsets is empty");
  same_device(values, valid, "valid");
  same_device(values, offsets, "group_offsets");
  AdvantageArgs a;
  a.n = values.size(0);
  a.n_groups = offsets.numel() - 1;
  a.standardize = standardize;
  a.values = data<float>(values);
  a.valid = data<uint8_t>(valid);
  a.group_offsets = data<int64_t>(offsets);
  std::optional<Tensor> order, weights, total;
  if (order_in.has_value()) {
    order = expect(*order_in, ScalarType::Long, 1, "order");
    same_device(values, *order, "order");
    require(order->numel() == a.n, "order and values differ in length");
    a.order = data<int64_t>(*order);
  }
  if (weights_in.has_value()) {
    weights = expect(*weights_in, ScalarType::Float, 2, "weights");
    same_device(values, *weights, "weights");
    a.n_criteria = static_cast<int32_t>(values.size(1));
    require(weights->size(0) == a.n_groups && weights->size(1) == a.n_criteria, "weights must be [n_groups, criteria]");
    total = empty(values, {a.n}, ScalarType::Double);
    a.weights = data<float>(*weights);
    a.total = data<double>(*total);
  }
  if (values.is_cpu()) {
    require(data<int64_t>(offsets)[0] == 0 && data<int64_t>(offsets)[a.n_groups] == a.n, "group_offsets must span the samples");
  }
  const Tensor advantages = empty(values, {a.n}, ScalarType::Float);
  const Tensor degenerate = empty(values, {a.n_groups}, ScalarType::Bool);
  a.advantages = data<float>(advantages);
  a.degenerate = data<uint8_t>(degenerate);
  launch(a, values);
  return {advantages, degenerate};
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_tiers(const Tensor& rows_in, const std::optional<Tensor>& ids_in,
                                                     const Tensor& values_in, double min_mass, Launch launch) {
  require(rows_in.scalar_type() == ScalarType::Float || rows_in.scalar_type() == ScalarType::BFloat16,
          "log-probabilities must be float32 or bfloat16");
  const Tensor rows = expect(rows_in, rows_in.scalar_type(), 2, "log-probabilities");
  const Tensor values = expect(values_in, ScalarType::Float, 1, "tier values");
  same_device(rows, values, "tier values");
  TierArgs a;
  a.n = rows.size(0);
  a.n_tiers = static_cast<int32_t>(values.numel());
  require(a.n_tiers > 0, "no tiers");
  a.bfloat16 = rows.scalar_type() == ScalarType::BFloat16;
  a.rows = rows.data_ptr();
  a.values = data<float>(values);
  a.min_mass = min_mass;
  std::optional<Tensor> ids;
  if (ids_in.has_value()) {
    ids = expect(*ids_in, ScalarType::Long, 1, "token_ids");
    same_device(rows, *ids, "token_ids");
    require(ids->numel() == a.n_tiers, "token_ids and tier values differ in length");
    a.vocabulary = rows.size(1);
    a.token_ids = data<int64_t>(*ids);
    if (rows.is_cpu()) {
      for (int32_t t = 0; t < a.n_tiers; ++t) {
        require(a.token_ids[t] >= 0 && a.token_ids[t] < a.vocabulary, "a tier's token id is outside the vocabulary");
      }
    }
  } else {
    require(rows.size(1) == a.n_tiers, "log-probabilities must be [n, tiers]");
  }
  const Tensor value = empty(rows, {a.n}, ScalarType::Float), entropy = empty(rows, {a.n}, ScalarType::Float);
  const Tensor mass = empty(rows, {a.n}, ScalarType::Float), read = empty(rows, {a.n}, ScalarType::Bool);
  a.value = data<float>(value);
  a.entropy = data<float>(entropy);
  a.mass = data<float>(mass);
  a.read = data<uint8_t>(read);
  launch(a, rows);
  return {value, entropy, mass, read};
}

template <class Launch>
Tensor run_digest(const Tensor& buffer_in, const Tensor& table_in, int64_t tile_bytes, int64_t tiles, Launch launch) {
  const Tensor buffer = expect(buffer_in, ScalarType::Byte, 1, "buffer");
  const Tensor table = expect(table_in, ScalarType::Long, 2, "table");
  same_device(buffer, table, "table");
  require(table.size(1) == 3, "table must be [n, 3]: offset, nbytes, first tile");
  require(tile_bytes > 0 && tile_bytes % 16 == 0 && tiles >= 0 && tiles <= INT32_MAX, "tiles do not fit");
  DigestArgs a;
  a.n = table.size(0);
  a.buffer_bytes = buffer.numel();
  a.tile_bytes = tile_bytes;
  a.tiles = tiles;
  a.buffer = data<uint8_t>(buffer);
  a.table = data<int64_t>(table);
  require(a.n > 0 || tiles == 0, "tiles of no tensor");
  if (buffer.is_cpu()) {
    int64_t seen = 0;
    for (int64_t t = 0; t < a.n; ++t) {
      const int64_t offset = a.table[3 * t], nbytes = a.table[3 * t + 1];
      require(offset >= 0 && nbytes >= 0 && offset <= a.buffer_bytes - nbytes, "a tensor leaves the buffer");
      require(a.table[3 * t + 2] == seen, "first tiles do not add up");
      seen += nbytes / tile_bytes + (nbytes % tile_bytes != 0);
    }
    require(seen == tiles, "tiles do not add up");
  }
  const Tensor sums = empty(buffer, {a.n, 2}, ScalarType::Long);
  a.sums = data<uint64_t>(sums);
  launch(a, buffer);
  return sums;
}

// One wrapper per op and device; `Device` supplies the launches.
#if defined(MEGARUBRIC_HOST_DEVICE)
struct Host {  // the .cu files compiled for the CPU: tests only
  static void aggregate(const AggregateArgs& a, const Tensor&) { cuda::aggregate(a, nullptr); }
  static void advantages(const AdvantageArgs& a, const Tensor&) { cuda::group_advantages(a, nullptr); }
  static void tiers(const TierArgs& a, const Tensor&) { cuda::tier_expectation(a, nullptr); }
  static void digest(const DigestArgs& a, const Tensor&) { cuda::weight_digest(a, nullptr); }
};
#else
struct Cpu {
  static void aggregate(const AggregateArgs& a, const Tensor&) { kernels().aggregate(a, parallel); }
  static void advantages(const AdvantageArgs& a, const Tensor&) { cpu::group_advantages(a, parallel); }
  static void tiers(const TierArgs& a, const Tensor&) { kernels().tier_expectation(a, parallel); }
  static void digest(const DigestArgs& a, const Tensor&) { kernels().weight_digest(a, parallel); }
};
#endif

#if defined(MEGARUBRIC_CUDA) && !defined(MEGARUBRIC_HOST_DEVICE)
struct Cuda {
  static void aggregate(const AggregateArgs& a, const Tensor& on) { cuda::aggregate(a, current_stream(on)); }
  static void advantages(const AdvantageArgs& a, const Tensor& on) { cuda::group_advantages(a, current_stream(on)); }
  static void tiers(const TierArgs& a, const Tensor& on) { cuda::tier_expectation(a, current_stream(on)); }
  static void digest(const DigestArgs& a, const Tensor& on) { cuda::weight_digest(a, current_stream(on)); }
};
#endif

template <class Device>
AggregateOutputs aggregate(Tensor scores, std::optional<Tensor> mask, Tensor offsets, Tensor rubric, Tensor table,
                           bool attribution, int64_t max_pairs) {
  AggregateInputs in(scores, mask, offsets, rubric, table, 1);
  return run_aggregate(in, attribution, max_pairs, [&](const AggregateArgs& a) { Device::aggregate(a, in.scores); });
}

template <class Device>
std::tuple<Tensor, Tensor> sweep(Tensor scores, std::optional<Tensor> mask, Tensor offsets, Tensor rubric,
                                 Tensor tables) {
  AggregateInputs in(scores, mask, offsets, rubric, tables, 2);
  return run_sweep(in, [&](const AggregateArgs& a) { Device::aggregate(a, in.scores); });
}

template <class Device>
std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, Tensor valid, Tensor group_offsets,
                                            std::optional<Tensor> order, bool standardize) {
  return run_advantages(rewards, valid, group_offsets, order, std::nullopt, standardize, Device::advantages);
}

template <class Device>
std::tuple<Tensor, Tensor> objective_wise(Tensor scores, Tensor mask, Tensor group_offsets, std::optional<Tensor> order,
                                          Tensor weights) {
  return run_advantages(scores, mask, group_offsets, order, weights, true, Device::advantages);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> tier_expectation(Tensor logprobs, Tensor values, double min_mass) {
  return run_tiers(logprobs, std::nullopt, values, min_mass, Device::tiers);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> tier_expectation_logits(Tensor logits, Tensor token_ids, Tensor values,
                                                                   double min_mass) {
  return run_tiers(logits, token_ids, values, min_mass, Device::tiers);
}

template <class Device>
Tensor weight_digest(Tensor buffer, Tensor table, int64_t tile_bytes, int64_t tiles) {
  return run_digest(buffer, table, tile_bytes, tiles, Device::digest);
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("aggregate", TORCH_BOX(&aggregate<Device>));
  m.impl("sweep", TORCH_BOX(&sweep<Device>));
  m.impl("group_advantages", TORCH_BOX(&group_advantages<Device>));
  m.impl("objective_wise", TORCH_BOX(&objective_wise<Device>));
  m.impl("tier_expectation", TORCH_BOX(&tier_expectation<Device>));
  m.impl("tier_expectation_logits", TORCH_BOX(&tier_expectation_logits<Device>));
  m.impl("weight_digest", TORCH_BOX(&weight_digest<Device>));
}

template <class Library>
void define(Library& m) {
  m.def(
      "aggregate(Tensor scores, Tensor? mask, Tensor offsets, Tensor rubric_index, Tensor table, bool attribution, "
      "int max_pairs) -> (Tensor reward, Tensor valid, Tensor vetoed, Tensor veto, Tensor r0, Tensor r1, "
      "Tensor attribution, Tensor pair_attribution, Tensor bad)");
  m.def(
      "sweep(Tensor scores, Tensor? mask, Tensor offsets, Tensor rubric_index, Tensor tables) -> "
      "(Tensor reward, Tensor bad)");
  m.def(
      "group_advantages(Tensor rewards, Tensor valid, Tensor group_offsets, Tensor? order, bool standardize) -> "
      "(Tensor advantages, Tensor degenerate)");
  m.def(
      "objective_wise(Tensor scores, Tensor mask, Tensor group_offsets, Tensor? order, Tensor weights) -> "
      "(Tensor advantages, Tensor degenerate)");
  m.def(
      "tier_expectation(Tensor logprobs, Tensor values, float min_tier_mass) -> "
      "(Tensor value, Tensor entropy, Tensor mass, Tensor read)");
  m.def(
      "tier_expectation_logits(Tensor logits, Tensor token_ids, Tensor values, float min_tier_mass) -> "
      "(Tensor value, Tensor entropy, Tensor mass, Tensor read)");
  m.def("weight_digest(Tensor buffer, Tensor table, int tile_bytes, int tiles) -> Tensor");
}

}  // namespace
}  // namespace megarubric

#if defined(MEGARUBRIC_HOST_DEVICE)

STABLE_TORCH_LIBRARY(megarubric_host, m) { megarubric::define(m); }
STABLE_TORCH_LIBRARY_IMPL(megarubric_host, CPU, m) { megarubric::implement<megarubric::Host>(m); }

#else

STABLE_TORCH_LIBRARY(megarubric, m) { megarubric::define(m); }
STABLE_TORCH_LIBRARY_IMPL(megarubric, CPU, m) { megarubric::implement<megarubric::Cpu>(m); }

#if defined(MEGARUBRIC_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megarubric, CUDA, m) { megarubric::implement<megarubric::Cuda>(m); }
#endif

// Read by megarubric/reward/ops.py through ctypes: what this library was built with and what it chose.
extern "C" __attribute__((visibility("default"))) const char* megarubric_cpu_isa() {
  return megarubric::kernels().name;
}

// Chooses a narrower set (the bits stay the same; tests check that). 0: this CPU or build does not have it.
extern "C" __attribute__((visibility("default"))) int megarubric_use_cpu_isa(const char* name) {
  const megarubric::cpu::Kernels* found = megarubric::find_kernels(name);
  if (found != nullptr) megarubric::chosen_kernels.store(found);
  return found != nullptr;
}

extern "C" __attribute__((visibility("default"))) const char* megarubric_cuda_architectures() {
#if defined(MEGARUBRIC_CUDA)
  return MEGARUBRIC_CUDA;
#else
  return "";
#endif
}

#endif
