// Parse, release the GIL, call. Addresses come as integers; shapes, dtypes and overlap are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "launch.hpp"
#include "topology.hpp"

namespace py = pybind11;
using namespace cpu_adam;

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& kernels(int isa) {
  const auto& list = available();
  if (isa < 0 || isa >= static_cast<int>(list.size())) throw py::value_error("isa: no such index in isas()");
  return *list[isa];
}

Dtype dtype(int code) {
  if (code < 0 || code >= kDtypes) throw py::value_error("dtype code: expected F32, BF16 or F16");
  return static_cast<Dtype>(code);
}

template <typename Code>
Code code(int value, int count, const char* what) {
  if (value < 0 || value >= count) throw py::value_error(std::string(what) + ": no such code");
  return static_cast<Code>(value);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->name);
  return names;
}

// splitmix64's finalizer.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Steps that run together, each over its own memory.
class Batch {
 public:
  explicit Batch(int isa) : kernels_(kernels(isa)) {}

  // Constants are double up to here; each is rounded to fp32 once, where torch's operators round theirs.
  void add(std::size_t n, int rule, int master_layout, int moments, Address param, Address master, Address exp_avg,
           Address exp_avg_sq, Address scale, Address grad, int grad_dtype, const std::vector<double>& constants,
           bool general, double unscale, double clip, std::uint64_t seed, std::uint64_t step_count,
           std::uint64_t group, Address count) {
    StepArgs args{};
    if (constants.size() > kConstants) throw py::value_error("constants: more than a rule may have");
    for (std::size_t i = 0; i < constants.size(); ++i) args.constants[i] = static_cast<float>(constants[i]);
    args.unscale = static_cast<float>(unscale);
    args.clip = static_cast<float>(clip);
    args.key = mix(mix(seed) ^ step_count);
    args.group = group;
    args.param = at(param);
    args.master = at(master);
    args.grad = at(grad);
    args.exp_avg = at(exp_avg);
    args.exp_avg_sq = at(exp_avg_sq);
    args.scale = at<float>(scale);
    const StepFn function =
        step_function(kernels_, code<Rule>(rule, kRules, "rule"), code<Master>(master_layout, kMasters, "master"),
                      code<Moments>(moments, kMomentFormats, "moments"), dtype(grad_dtype), general);
    if (function == nullptr) throw py::value_error("step: this rule, master and moments are not offered together");
    calls_.push_back({function, args, n});
    if (count != 0) counts_.push_back({at<float>(count), static_cast<float>(step_count)});
  }

  // Then writes each step's count to where it is kept.
  void run(int threads) const {
    {
      py::gil_scoped_release release;
      launch_steps(calls_, threads);
    }
    for (const auto& [kept, step] : counts_) *kept = step;
  }

 private:
  const Kernels& kernels_;
  std::vector<Call> calls_;
  std::vector<std::pair<float*, float>> counts_;
};

double intake(std::size_t n, Address dst, int dst_dtype, Address src, int src_dtype, bool accumulate, int isa,
              int threads) {
  const Kernels& k = kernels(isa);
  const Dtype d = dtype(dst_dtype), s = dtype(src_dtype);
  py::gil_scoped_release release;
  return launch_intake(k, at(dst), d, at(src), s, accumulate, n, threads);
}

double sum_squares(std::size_t n, Address src, int src_dtype, int isa, int threads) {
  const Kernels& k = kernels(isa);
  const Dtype s = dtype(src_dtype);
  py::gil_scoped_release release;
  return launch_stats(k, at(src), s, n, threads);
}

void split(std::size_t n, Address master, Address param, Address remainder, int isa, int threads) {
  const Kernels& k = kernels(isa);
  py::gil_scoped_release release;
  launch_split(k, at<float>(master), at<std::uint16_t>(param), at<std::int16_t>(remainder), n, threads);
}

void join(std::size_t n, Address param, Address remainder, Address master, int isa, int threads) {
  const Kernels& k = kernels(isa);
  py::gil_scoped_release release;
  launch_join(k, at<std::uint16_t>(param), at<std::int16_t>(remainder), at<float>(master), n, threads);
}

void stream_pattern(std::size_t n, const std::vector<std::tuple<Address, std::size_t, bool>>& arrays, int isa,
                    int threads) {
  const Kernels& k = kernels(isa);
  std::vector<StreamArray> list;
  for (const auto& [address, group_bytes, written] : arrays) list.push_back({at<char>(address), group_bytes, written});
  py::gil_scoped_release release;
  launch_stream(k, list.data(), static_cast<int>(list.size()), n, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu_adam, m) {
  m.doc() = "The SIMD kernels behind tierflow.cpu_adam.kernels, on raw addresses.";
  m.attr("F32") = static_cast<int>(kF32);
  m.attr("BF16") = static_cast<int>(kBF16);
  m.attr("F16") = static_cast<int>(kF16);
  m.attr("MASTER_IS_PARAM") = static_cast<int>(kMasterIsParam);
  m.attr("LOSSLESS") = static_cast<int>(kLossless);
  m.attr("MASTER_BF16") = static_cast<int>(kMasterBF16);
  m.attr("MASTER_F16") = static_cast<int>(kMasterF16);
  m.attr("MASTER_24") = static_cast<int>(kMaster24);
  m.attr("MOMENTS_F32") = static_cast<int>(kMomentsF32);
  m.attr("MOMENTS_BF16") = static_cast<int>(kMomentsBF16);
  m.attr("MOMENTS_INT8") = static_cast<int>(kMomentsInt8);
  m.attr("ADAM") = static_cast<int>(kAdam);
  m.attr("LION") = static_cast<int>(kLion);
  m.attr("ADAGRAD") = static_cast<int>(kAdagrad);
  m.attr("GROUP") = static_cast<int>(kGroup);
  m.def("isas", &isas);
  m.def("numa_nodes", [](const std::string& folder) { return numa_nodes(folder.empty() ? node_folder() : folder); },
        py::arg("folder"));
  py::class_<Batch>(m, "Batch")
      .def(py::init<int>(), py::arg("isa"))
      .def("add", &Batch::add, py::arg("n"), py::arg("rule"), py::arg("master_layout"), py::arg("moments"),
           py::arg("param"), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("scale"),
           py::arg("grad"), py::arg("grad_dtype"), py::arg("constants"), py::arg("general"), py::arg("unscale"),
           py::arg("clip"), py::arg("seed"), py::arg("step"), py::arg("group"), py::arg("count"))
      .def("run", &Batch::run, py::arg("threads"));
  m.def("intake", &intake, py::arg("n"), py::arg("dst"), py::arg("dst_dtype"), py::arg("src"), py::arg("src_dtype"),
        py::arg("accumulate"), py::arg("isa"), py::arg("threads"));
  m.def("sum_squares", &sum_squares, py::arg("n"), py::arg("src"), py::arg("src_dtype"), py::arg("isa"),
        py::arg("threads"));
  m.def("split", &split, py::arg("n"), py::arg("master"), py::arg("param"), py::arg("remainder"), py::arg("isa"),
        py::arg("threads"));
  m.def("join", &join, py::arg("n"), py::arg("param"), py::arg("remainder"), py::arg("master"), py::arg("isa"),
        py::arg("threads"));
  m.def("stream_pattern", &stream_pattern, py::arg("n"), py::arg("arrays"), py::arg("isa"), py::arg("threads"));
}
