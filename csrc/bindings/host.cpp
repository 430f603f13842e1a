// patch_kernels._host: for tests and tools, without torch: the layout functions of format/layout.h, the operand maps of
// gemm/, the planner of gemm/plan.h and the launches of check/self_check.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../check/self_check.h"
#include "../format/layout.h"
#include "../gemm/fragments.h"
#include "../gemm/plan.h"
#include "../gemm/wgmma.h"
#include "../math/elements.h"
#include "../math/mask.h"

namespace pk = patch_kernels;
namespace py = pybind11;

namespace {

std::vector<int32_t> make_schedule(const std::vector<std::vector<bool>>& tile_is_sparse) {
  const size_t rows = tile_is_sparse.size(), cols = rows ? tile_is_sparse[0].size() : 0;
  std::vector<uint8_t> flags;
  for (const auto& row : tile_is_sparse) {
    if (row.size() != cols) throw std::invalid_argument("make_schedule: expected rows of equal length");
    flags.insert(flags.end(), row.begin(), row.end());
  }
  std::vector<int32_t> words(pk::schedule_words(static_cast<int64_t>(rows), static_cast<int64_t>(cols)));
  pk::make_schedule(flags.data(), static_cast<int64_t>(rows), static_cast<int64_t>(cols), words.data());
  return words;
}

// The parts of a schedule, as kernels see them.
py::dict read_schedule(const std::vector<int32_t>& words) {
  if (words.size() < pk::kScheduleHeader || words[0] != pk::kScheduleMagic) {
    throw std::invalid_argument("read_schedule: expected words made by make_schedule");
  }
  const pk::Schedule view = pk::schedule_view(words.data(), words[1], words[2]);
  const int rows = view.tile_rows, cols = view.tile_cols, pairs = (rows + 1) / 2;
  std::vector<std::pair<int64_t, bool>> tiles;
  for (int t = 0; t < rows * cols; ++t) {
    tiles.emplace_back(pk::entry_offset(view.tiles[t]), pk::entry_is_sparse(view.tiles[t]));
  }
  py::dict parts;
  parts["tiles"] = tiles;
  parts["order"] = std::vector<int>(view.order, view.order + rows);
  parts["row_cuts"] = std::vector<int>(view.row_cuts, view.row_cuts + rows * pk::kCuts);
  parts["pair_cuts"] = std::vector<int>(view.pair_cuts, view.pair_cuts + pairs * pk::kCuts);
  return parts;
}

// exponential() of all 2^21 inputs, as float32.
py::bytes exponentials() {
  std::vector<float> values(1 << 21);
  for (uint32_t bits = 0; bits < values.size(); ++bits) values[bits] = pk::exponential<float>(bits);
  return py::bytes(reinterpret_cast<const char*>(values.data()), sizeof(float) * values.size());
}

const char* family_name(pk::Family family) {
  return family == pk::Family::kSm90 ? "sm90" : family == pk::Family::kSm80 ? "sm80" : "unpack";
}

// `clusters`: clusters of 1, 2, 4, 8 CTAs that a card runs at once, as it said; none: it was not asked.
pk::DeviceLimits limits_of(int compute_capability, int sm_count, int smem_bytes,
                           const std::optional<std::array<int, 4>>& clusters) {
  pk::DeviceLimits limits{};
  limits.family = pk::best_family(compute_capability);
  limits.compute_capability = compute_capability;
  limits.sm_count = sm_count;
  limits.smem_bytes = smem_bytes;
  limits.clusters_known = clusters.has_value();
  for (int i = 0; clusters.has_value() && i < 4; ++i) limits.clusters[1 << i] = (*clusters)[i];
  return limits;
}

using Choice = std::tuple<int, int, int, int, int>;  // bn, token_ctas, row_ctas, splits, depth

std::vector<Choice> choices_of(const std::vector<pk::PlanChoice>& choices) {
  std::vector<Choice> all;
  for (const pk::PlanChoice& c : choices) all.emplace_back(c.bn, c.token_ctas, c.row_ctas, c.splits, c.depth);
  return all;
}

using Constants = std::map<std::string, double>;

struct NamedConstant {
  const char* name;
  double pk::ModelConstants::* value;
};
constexpr NamedConstant kConstants[] = {
#define PK_NAMED(name) {#name, &pk::ModelConstants::name}
    PK_NAMED(cycles_per_us),           PK_NAMED(memory_bytes_per_cycle), PK_NAMED(link_bytes_per_cycle),
    PK_NAMED(cluster_bytes_per_cycle), PK_NAMED(shared_bytes_per_cycle), PK_NAMED(shared_write_share),
    PK_NAMED(macs_per_cycle),          PK_NAMED(launch_cycles),          PK_NAMED(item_cycles),
    PK_NAMED(item_token_cycles),       PK_NAMED(switch_cycles),          PK_NAMED(exchange_turn_cycles),
    PK_NAMED(exchange_output_cycles),  PK_NAMED(sm80_macs_per_cycle),    PK_NAMED(sm80_sparse_share),
    PK_NAMED(sm80_reduce_cycles),
#undef PK_NAMED
};
static_assert(sizeof(kConstants) / sizeof(kConstants[0]) * sizeof(double) == sizeof(pk::ModelConstants),
              "every constant has its name here");

Constants model_constants() {
  const pk::ModelConstants values;
  Constants all;
  for (const NamedConstant& constant : kConstants) all[constant.name] = values.*constant.value;
  return all;
}

pk::ModelConstants constants_of(const Constants& changed) {
  pk::ModelConstants values;
  size_t found = 0;
  for (const NamedConstant& constant : kConstants) {
    const auto entry = changed.find(constant.name);
    if (entry != changed.end()) values.*constant.value = entry->second, ++found;
  }
  if (found != changed.size()) {
    throw std::invalid_argument("constants: expected names of model_constants(), got one that is not there");
  }
  return values;
}

py::dict choose_plan(int64_t rows, int64_t cols, int64_t tokens, int64_t payload_bytes, bool batch_invariant,
                     const pk::DeviceLimits& limits, const Constants& constants) {
  const pk::ModelConstants values = constants_of(constants);
  const pk::LaunchPlan plan = pk::choose_plan(limits, rows, cols, tokens, payload_bytes, batch_invariant, values);
  py::dict parts;
  parts["family"] = family_name(plan.family);
  if (plan.family == pk::Family::kUnpack) return parts;
  parts["pairs"] = plan.pairs;
  parts["bn"] = plan.bn;
  parts["token_ctas"] = plan.token_ctas;
  parts["row_ctas"] = plan.row_ctas;
  parts["splits"] = plan.splits;
  parts["depth"] = plan.depth;
  parts["units"] = plan.items.units;
  parts["groups"] = plan.items.groups;
  parts["groups_per_block"] = plan.items.groups_per_block;
  parts["workers"] = plan.items.workers;
  parts["model_us"] = pk::model_time_us(limits, plan, rows, cols, tokens, payload_bytes, values);
  return parts;
}

// A call: rows, cols, tokens, payload bytes, the choice, and workers (0: as the limits have it).
using Call = std::array<int64_t, 10>;

std::vector<double> model_times_us(const std::vector<Call>& calls, const pk::DeviceLimits& limits,
                                   const Constants& constants) {
  const pk::ModelConstants values = constants_of(constants);
  std::vector<double> times;
  for (const Call& call : calls) {
    const auto number = [&](int i) { return static_cast<int>(call[i]); };
    const pk::PlanChoice choice{number(4), number(5), number(6), number(7), number(8)};
    pk::LaunchPlan plan = pk::plan_of(limits, choice, call[0], call[1], call[2]);
    if (number(9) > 0) plan.items.workers = number(9);
    times.push_back(pk::model_time_us(limits, plan, call[0], call[1], call[2], call[3], values));
  }
  return times;
}

// What a card is checked with: of each problem its sizes, and the choice and ItemSpace of each launch.
py::list self_checks(const pk::DeviceLimits& limits, bool is_half) {
  py::list all;
  for (const pk::SelfCheck& check : pk::self_checks(limits, is_half ? pk::DType::kFloat16 : pk::DType::kBFloat16)) {
    py::list launches;
    for (const pk::LaunchPlan& plan : check.plans) {
      const pk::ItemSpace& items = plan.items;
      launches.append(py::make_tuple(py::make_tuple(plan.bn, plan.token_ctas, plan.row_ctas, plan.splits, plan.depth),
                                     py::make_tuple(items.units, items.groups, items.groups_per_block, items.workers)));
    }
    py::dict problem;
    problem["rows"] = check.sizes.rows, problem["cols"] = check.sizes.cols, problem["tokens"] = check.sizes.tokens;
    problem["layers"] = check.layers, problem["own_tokens"] = check.own_tokens;
    problem["launches"] = launches;
    all.append(problem);
  }
  return all;
}

// The (unit, group) items of every worker, in their order.
std::vector<std::vector<std::pair<int, int>>> items(int units, int groups, int groups_per_block, int workers) {
  if (units < 1 || groups < 1 || groups_per_block < 1 || workers < 1) {
    throw std::invalid_argument("items: expected four numbers >= 1");
  }
  const pk::ItemSpace space{units, groups, groups_per_block, workers};
  std::vector<std::vector<std::pair<int, int>>> all(workers);
  for (int worker = 0; worker < workers; ++worker) {
    for (int round = 0; round < pk::item_rounds(space); ++round) {
      const pk::Item item = pk::item_of(space, worker, round);
      if (item.unit >= 0) all[worker].emplace_back(item.unit, item.group);
    }
  }
  return all;
}

void add_operand_maps(py::module_& m) {
  m.attr("A_STEP") = pk::kAStep;
  m.attr("A_BLOCK_STEP") = pk::kABlockStep;
  m.attr("B_DENSE_STEP") = pk::kBDenseStep;
  m.attr("B_SPARSE_STEP") = pk::kBSparseStep;
  m.attr("META_BLOCK_BYTES") = pk::kMetaBlockBytes;
  m.def("wgmma_descriptor", [](uint32_t smem_address) { return pk::wgmma_descriptor(smem_address); });
  m.def("fragment_row", [](int t, int i) { return pk::fragment_row(t, i); });
  m.def("fragment_token", [](int t, int i) { return pk::fragment_token(t, i); });
  m.def("stage_offset", [](int t) { return pk::stage_offset(t); });
  m.def("weight_address", [](int lane, int row0, int unit) { return pk::weight_address(lane, row0, unit); });
  m.def("token_address", [](int lane, int token0, int unit) { return pk::token_address(lane, token0, unit); });
  m.def("sum_row", [](int lane, int i) { return pk::sum_row(lane, i); });
  m.def("sum_token", [](int lane, int i) { return pk::sum_token(lane, i); });
  m.def("meta_address", [](int lane, int row0, int half) { return pk::meta_address(lane, row0, half); });
}

void add_planner(py::module_& m) {
  py::class_<pk::DeviceLimits>(m, "DeviceLimits")
      .def(py::init(&limits_of), py::arg("compute_capability") = 90, py::arg("sm_count") = 132,
           py::arg("smem_bytes") = 232448, py::arg("clusters") = py::none());
  const pk::DeviceLimits h100 = limits_of(90, 132, 232448, {});
  m.def("model_constants", &model_constants);
  m.def("choose_plan", &choose_plan, py::arg("rows"), py::arg("cols"), py::arg("tokens"), py::arg("payload_bytes"),
        py::arg("batch_invariant") = false, py::arg("limits") = h100, py::arg("constants") = Constants{});
  m.def(
      "possible_choices",
      [](int64_t cols, int64_t tokens, const pk::DeviceLimits& limits) {
        return choices_of(pk::possible_choices(limits, cols, tokens));
      },
      py::arg("cols"), py::arg("tokens"), py::arg("limits") = h100);
  m.def(
      "launch_shapes", [](const pk::DeviceLimits& limits) { return choices_of(pk::launch_shapes(limits)); },
      py::arg("limits") = h100);
  m.def("family_complaint", &pk::family_complaint, py::arg("limits"));
  m.def("model_times_us", &model_times_us, py::arg("calls"), py::arg("limits") = h100,
        py::arg("constants") = Constants{});
  m.def("self_checks", &self_checks, py::arg("limits"), py::arg("is_half") = true);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packed format v1, byte by byte (csrc/format/layout.h), and the GEMM's operand maps, schedules and plans.";
  m.attr("TILE") = pk::kTile;
  m.attr("DENSE_TILE_BYTES") = pk::kDenseTileBytes;
  m.attr("SPARSE_TILE_BYTES") = pk::kSparseTileBytes;
  m.attr("SLOT_BYTES") = pk::kSlotBytes;
  m.def("dense_offset", [](int r, int k) { return pk::dense_offset(r, k); });
  m.def("value_offset", [](int r, int p) { return pk::value_offset(r, p); });
  m.def("meta_word", [](int r, int c) { return pk::meta_word(r, c); });
  m.def("meta_shift", [](int r, int c) { return pk::meta_shift(r, c); });
  m.def("group_nibble", [](int bits) { return pk::group_nibble(bits); });
  m.def("is_legal_nibble", [](int nibble) { return pk::is_legal_nibble(nibble); });
  add_operand_maps(m);
  m.attr("CUTS") = pk::kCuts;
  m.def("make_schedule", &make_schedule, py::arg("tile_is_sparse"));
  m.def("read_schedule", &read_schedule, py::arg("words"));
  add_planner(m);
  m.def("items", &items, py::arg("units"), py::arg("groups"), py::arg("groups_per_block"), py::arg("workers"));
  m.def("exponentials", &exponentials);
}
